"""Health, metrics and /v1/info."""

import platform
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engines.types import Engine
from server import __version__
from server.generation.aspect_ratios import sizes_by_ratio
from server.generation.model_engines import engines_by_name
from server.http.plain_route import PlainRoute
from server.http.routes import openapi
from server.http.state import AppState, app_state
from server.telemetry import metrics as exposition

router = APIRouter(route_class=PlainRoute)


@router.get("/health/live", **openapi.LIVE)
async def live(_: Request) -> Response:
    """Returns 200 while the process responds."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready", **openapi.READY)
async def ready(request: Request) -> Response:
    """Returns 200 once the engine is loaded and warm; 503 before, while draining, and when the engine hangs.

    `building` is the progress of the engine under construction.
    """
    scheduler = app_state(request).scheduler
    scheduler.check_ready()
    building = scheduler.building
    return JSONResponse({"status": "ready"} | ({} if building is None else {"building": building.to_dict()}))


@router.get("/metrics", **openapi.METRICS)
async def metrics(request: Request) -> Response:
    """Returns the metrics in Prometheus' text format."""
    state = app_state(request)
    return Response(await state.render_metrics(state.metrics), media_type=exposition.CONTENT_TYPE)


@router.get("/v1/info", **openapi.INFO)
async def info(request: Request) -> Response:
    """Returns the running engine, its limits, and the reason of each choice; in `models` those of each model."""
    state = app_state(request)
    models = {name: _facts(engine, state) for name, engine in engines_by_name(state.scheduler.engine).items()}
    facts = _facts(state.scheduler.engine, state)
    if (cores := request.app.state.cores) is not None:
        threads, why = cores
        facts |= {"threads": threads, "reasons": {**facts["reasons"], "threads": why}}
    return JSONResponse(
        {
            **facts,
            "models": models,
            "max_queue": state.settings.max_queue,
            "timeout_ms": state.settings.timeout_ms,
            "safety": dict(state.settings.safety) or None,
        }
    )


def _facts(engine: Engine, state: AppState) -> dict[str, Any]:
    """Returns the description of one engine, and its limits."""
    limits = engine.limits
    return {
        **asdict(engine.info),
        "versions": {"sana-sprint-server": __version__, "python": platform.python_version()} | engine.info.versions,
        "default_size": limits.default_size,
        "sizes": limits.sizes or None,
        "aspect_ratios": sizes_by_ratio(limits),
        "size_multiple": limits.multiple,
        "min_side": limits.min_side,
        "max_side": limits.max_side,
        "max_pixels": limits.max_pixels,
        "steps": limits.steps,
        "adapters": limits.adapters,
        "conditioning": sorted(limits.conditioning),
        "max_batch": min(limits.max_batch, state.settings.max_batch),
    }
