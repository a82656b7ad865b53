"""One replica: the app of `python -m server` inside an actor of Ray Serve, with what Serve asks of it."""

import asyncio
import logging
import os
from typing import Any

from fastapi import FastAPI

from server.app import create_app
from server.cluster.scaling import INSIDE, WAITING
from server.errors import UnavailableError
from server.http.state import AppState
from server.loading.engine_loader import engine_source
from server.processes.cores import configure_openmp
from server.processes.malloc import configure_malloc
from server.settings import Settings
from server.telemetry import aggregation, logs

GATHER_S = 8.0  # for all replicas to tell their metrics; Prometheus waits for 10 s

logger = logging.getLogger("server.cluster")


class Replica:
    """Serve makes one in each actor, then asks it for its app. It takes requests once its first health check returns,
    which is when its engine is warm."""

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
            expose=lambda _: self._all_metrics(),
            cores=configure_openmp(os.environ),
        )
        self._service = app.state.service
        return app

    @property
    def _running(self) -> AppState:
        assert self._service is not None, "Serve builds the app before it asks anything else"
        return self._service

    async def check_health(self) -> None:
        """Raises UnavailableError where the engine is lost, upon which Serve replaces this replica."""
        scheduler = self._running.scheduler
        await scheduler.ready.wait()
        _ = scheduler.engine

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What server.cluster.scaling decides by."""
        scheduler = self._running.scheduler
        return {WAITING: scheduler.waiting, INSIDE: scheduler.in_flight}

    async def metrics(self) -> tuple[str, bytes]:
        """This replica's name and numbers."""
        return self._name, self._running.metrics.exposition()

    async def _all_metrics(self) -> bytes:
        asked = self._all.broadcast("metrics")
        try:
            answers: list[Any] = await asked.results_async(timeout_s=GATHER_S, return_exceptions=True)
        except TimeoutError as error:
            detail = f"not all replicas told their metrics within {GATHER_S:g} s"
            raise UnavailableError(detail, code="metrics_late", retry_after_s=5) from error
        found = dict(answer for answer in answers if not isinstance(answer, BaseException))
        if len(found) < len(answers):
            logger.warning("%d of %d replicas told no metrics", len(answers) - len(found), len(answers))
        return await asyncio.to_thread(aggregation.merge_expositions, found)
