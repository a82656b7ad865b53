"""Builds the ASGI app and defines its start-up and shutdown. Imports no torch; the caller passes the engine."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from engines.types import Engine, ReportsMemory
from server import __version__
from server.generation.engine_source import EngineSource, FixedEngineSource
from server.generation.generator import Generator
from server.generation.image_codec import Codec
from server.generation.model_engines import engines_by_name
from server.generation.safety.guard import Safety
from server.generation.scheduler import Scheduler
from server.http import problem_details
from server.http.api_keys import ApiKeys
from server.http.cors import Cors
from server.http.exact_routes import ExactRoutes
from server.http.middleware import BodyLimits, RequestMiddleware
from server.http.routes import generate, openai, openapi, page, sdapi, status
from server.http.state import AppState, request_context
from server.http.upload_limit import UploadLimit
from server.live import route as live_route
from server.live.sessions import LiveSessions
from server.origins import Origins
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.timings import process_age_s
from server.telemetry.tracing import Tracing

MAX_LARGE_BODIES = 32  # read at the same time, each at most --body-limit-mib

logger = logging.getLogger("server")


def exit_process(exit_code: int) -> None:
    """Exits without cleanup: an engine that hangs in native code cannot be stopped."""
    logging.shutdown()
    os._exit(exit_code)


async def local_metrics(metrics: Metrics) -> bytes:
    """Returns the metrics of this process as Prometheus text."""
    return metrics.exposition()


def create_app(
    engine: Engine | Callable[[], Engine] | EngineSource,
    settings: Settings,
    *,
    exit_process: Callable[[int], None] = exit_process,
    render_metrics: Callable[[Metrics], Awaitable[bytes]] = local_metrics,
    cores: tuple[int, str] | None = None,
) -> FastAPI:
    """Returns the server as an ASGI app.

    `engine` is an engine, a function that loads one, or an EngineSource. One thread of its own loads, warms up, calls
    and closes it, from the app's start-up on. The app calls `exit_process` with an exit code of server.errors when the
    engine is lost. `render_metrics` returns the body of GET /metrics: of this process, or of all workers or replicas.
    `cores` is the number of threads and its reason, for GET /v1/info.
    Raises SettingsError for a bad API key file or checker, and for traces without the extra `otel`.
    """
    source = _source(engine)
    keys = None if settings.api_key_file is None else ApiKeys(Path(settings.api_key_file))
    metrics = Metrics(
        request_buckets=settings.request_buckets,
        stage_buckets=settings.stage_buckets,
        models=[model.name for model in settings.models],
    )
    codec = Codec(settings.codec_threads)
    scheduler = Scheduler(
        source,
        codec,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        batch_timeout_s=settings.batch_timeout_s,
        shutdown_timeout_s=settings.shutdown_timeout_s,
        metrics=metrics,
        leave=exit_process,
        when_ready=lambda ready: _announce_engine(ready, metrics),
    )
    metrics.workers_desired.set(settings.workers)
    metrics.build_progress.set_function(lambda: 1.0 if (build := source.building()) is None else build.percent / 100)
    metrics.build_seconds_left.set_function(
        lambda: 0.0 if (build := source.building()) is None else build.seconds_left or 0.0
    )
    metrics.worker_ready.set_function(lambda: scheduler.state == "ready")
    tracing = None if settings.otlp_endpoint is None else Tracing(settings.otlp_endpoint)
    safety = Safety(dict(settings.safety), metrics)
    generator = Generator(scheduler, codec, safety, timeout_ms=settings.timeout_ms)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await codec.warm()
        await scheduler.start()
        try:
            yield
        finally:
            await scheduler.close()
            codec.close()
            metrics.bookkeeping.finish()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="sana-sprint-server",
        version=__version__,
        description="Images from text in one step: SANA-Sprint over HTTP.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # replaced by server/static/docs.html, which loads no script from another host
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # server/telemetry records them
    )
    origins = Origins(settings.cors_origins)
    app.state.service = AppState(
        settings, metrics, scheduler, codec, generator, UploadLimit(MAX_LARGE_BODIES), render_metrics
    )
    app.state.live = LiveSessions(scheduler, generator, metrics, settings)
    app.state.cores = cores
    routers = [routes.router for routes in (generate, status, live_route, page, openai)]
    if "sdapi" in settings.compat:
        app.state.sdapi_requests = sdapi.RunningRequests()
        routers.append(sdapi.router)
    for router in routers:
        app.include_router(router)
    if page.STATIC.is_dir():
        app.mount("/static", StaticFiles(directory=page.STATIC), name="static")
    openapi.describe(app)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_middleware(ExactRoutes, routes=[route for router in routers for route in router.routes])
    app.add_middleware(
        RequestMiddleware,
        metrics=metrics,
        keys=keys,
        origins=origins,
        limits=BodyLimits(body_bytes=settings.body_limit, body_s=settings.body_timeout_s),
        tracing=tracing,
    )
    if settings.cors_origins:
        app.add_middleware(Cors, origins=origins)
    return app


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    problem = problem_details.from_http_exception(error)
    return problem_details.response(problem, path=request.url.path, request_id=request_context(request).request_id)


def _source(engine: Engine | Callable[[], Engine] | EngineSource) -> EngineSource:
    if isinstance(engine, EngineSource):
        return engine
    return FixedEngineSource(engine if callable(engine) else lambda: engine)


def _announce_engine(engine: Engine, metrics: Metrics) -> None:
    """Publishes and logs what runs, and why, once the engine is ready."""
    engines = engines_by_name(engine)
    metrics.describe_engines([one.info for one in engines.values()], __version__)
    metrics.name_sizes(size for one in engines.values() for size in one.limits.sizes or (one.limits.default_size,))
    if isinstance(engine, ReportsMemory):
        metrics.watch_memory(engine.memory_bytes)
    if (age_s := process_age_s()) is not None:
        start_s = engine.info.start_s
        if {"load", "warm-up"} <= start_s.keys():  # not of an engine that replaces another
            start_s["server"] = round(age_s - start_s["load"] - start_s["warm-up"], 2)
        start_s["process"] = age_s
    for one in engines.values():
        info = one.info
        logger.info("ready: %s on %s, %s, %s", info.checkpoint, info.device, info.backend, info.precision)
        logger.info("start: %s", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in info.start_s.items()))
        for choice, reason in info.reasons.items():
            logger.info("%s: %s", choice, reason)
