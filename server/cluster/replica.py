"""One replica: the app of `python -m server` in an actor of Ray Serve, with Serve's callbacks."""

import asyncio
import logging
import os
from typing import Any

from fastapi import FastAPI

from server.app import create_app
from server.cluster.scaling import IN_FLIGHT, WAITING
from server.errors import UnavailableError
from server.http.state import AppState
from server.loading.engine_loader import engine_source
from server.processes.cores import configure_openmp
from server.processes.malloc import configure_malloc
from server.settings import Settings
from server.telemetry import aggregation, logs

SCRAPE_S = 8.0  # limit for the metrics of all replicas; Prometheus waits for 10 s

logger = logging.getLogger("server.cluster")


class Replica:
    """Serve creates one per actor and sends it requests after the first health check, when its engine is warm."""

    def __init__(self, settings: Settings) -> None:
        from ray import serve

        context = serve.get_replica_context()
        self._settings = settings
        self._name = context.replica_id.unique_id
        self._all = serve.get_deployment_handle(context.deployment, context.app_name)
        logs.configure(settings.log_format, settings.log_level, {"replica": self._name})
        configure_malloc(os.environ)
        self._service: AppState | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(
            engine_source(self._settings),
            self._settings,
            render_metrics=lambda _: self._all_metrics(),
            cores=configure_openmp(os.environ),
        )
        self._service = app.state.service
        return app

    @property
    def _running(self) -> AppState:
        assert self._service is not None, "Serve builds the app before any other call"
        return self._service

    async def check_health(self) -> None:
        """Raises UnavailableError when the engine is lost; Serve replaces the replica then."""
        scheduler = self._running.scheduler
        await scheduler.ready.wait()
        _ = scheduler.engine

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the input of server.cluster.scaling."""
        scheduler = self._running.scheduler
        return {WAITING: scheduler.waiting, IN_FLIGHT: scheduler.in_flight}

    async def metrics(self) -> tuple[str, bytes]:
        """Returns this replica's name and metrics."""
        return self._name, self._running.metrics.exposition()

    async def _all_metrics(self) -> bytes:
        responses = self._all.broadcast("metrics")
        try:
            answers: list[Any] = await responses.results_async(timeout_s=SCRAPE_S, return_exceptions=True)
        except TimeoutError as error:
            detail = f"not all replicas sent their metrics within {SCRAPE_S:g} s"
            raise UnavailableError(detail, code="metrics_late", retry_after_s=5) from error
        expositions = dict(answer for answer in answers if not isinstance(answer, BaseException))
        if len(expositions) < len(answers):
            logger.warning("%d of %d replicas sent no metrics", len(answers) - len(expositions), len(answers))
        return await asyncio.to_thread(aggregation.merge_expositions, expositions)
