"""Our own routes: POST /generate, health, metrics, /v1/info and the page."""

import platform
import re
import time
from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.websockets import WebSocket

from server import __version__, openapi_doc
from server import metrics as exposition
from server.direct import DirectRoute
from server.errors import HttpError
from server.generation import Delivery, Timings
from server.intake import read_json, until_gone
from server.schemas import GenerateRequest
from server.service import context_of, service_of

STATIC = Path(__file__).parent / "static"

router = APIRouter(route_class=DirectRoute)


@router.post("/generate", **openapi_doc.GENERATE)
async def generate(request: Request) -> Response:
    """Makes one to eight pictures.

    One picture comes as image bytes, unless the Accept header asks for application/json; several come as JSON.
    """
    service, context = service_of(request), context_of(request)
    body = await read_json(request, GenerateRequest, service)
    as_json = body.num_images > 1 or prefers_json(request.headers.get("accept", ""))
    making = service.generation.make(body.order(base64=as_json), context.arrived)
    del body  # it may hold large images, which are not needed once they are decoded
    delivery = await until_gone(making, request.receive)
    request.state.timings = delivery.timings_ms  # for the trace
    headers = {"server-timing": server_timing(delivery.timings_ms)}
    if delivery.prompt_truncated:
        headers["x-prompt-truncated"] = "true"
    if not as_json:
        picture = delivery.pictures[0]
        headers["x-seed"] = str(picture.seed)
        return Response(picture.content, headers=headers, media_type=f"image/{delivery.output_format}")
    model = service.batcher.engine.info.checkpoint
    content = await service.codec.run(answer_json, delivery, context.request_id, model)
    return Response(content, headers=headers, media_type="application/json")


@router.get("/health/live", **openapi_doc.LIVE)
async def live(_: Request) -> Response:
    """Answers while the process can answer at all."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready", **openapi_doc.READY)
async def ready(request: Request) -> Response:
    """200 once the engine is loaded and warm; 503 before, while draining, and when the engine does not answer."""
    service_of(request).batcher.check_ready()
    return JSONResponse({"status": "ready"})


@router.get("/metrics", **openapi_doc.METRICS)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    service = service_of(request)
    return Response(await service.expose(service.metrics), media_type=exposition.CONTENT_TYPE)


@router.get("/v1/info", **openapi_doc.INFO)
async def info(request: Request) -> Response:
    """What runs here, what it can run, and why it was chosen."""
    service = service_of(request)
    engine = service.batcher.engine
    limits = engine.limits
    told = asdict(engine.info)
    cores = request.app.state.cores
    if cores is not None:
        told |= {"threads": cores.count, "reasons": {**told["reasons"], "threads": cores.reason}}
    return JSONResponse(
        {
            **told,
            "versions": {"sana-sprint-server": __version__, "python": platform.python_version()} | engine.info.versions,
            "default_size": limits.default_size,
            "sizes": limits.sizes or None,
            "size_multiple": limits.multiple,
            "min_side": limits.min_side,
            "max_side": limits.max_side,
            "max_pixels": limits.max_pixels,
            "steps": limits.steps,
            "conditioning": sorted(limits.conditioning),
            "max_batch": min(limits.max_batch, service.settings.max_batch),
            "max_queue": service.settings.max_queue,
            "timeout_ms": service.settings.timeout_ms,
        }
    )


@router.websocket("/v1/live")
async def live_drawing(socket: WebSocket) -> None:
    """Pictures of drawings, while they are drawn: docs/live.md."""
    await service_of(socket).live.serve(socket, context_of(socket))


@router.get("/", include_in_schema=False)
async def page(_: Request) -> Response:
    """The web page."""
    return _static("index.html")


@router.get("/docs", include_in_schema=False)
async def docs(_: Request) -> Response:
    """The routes, for people: a page of ours over /openapi.json."""
    return _static("docs.html")


def _static(name: str) -> Response:
    path = STATIC / name
    if not path.is_file():
        raise HttpError(404, "this installation has no web pages; GET /openapi.json lists the routes")
    return FileResponse(path)


def prefers_json(accept: str) -> bool:
    """Whether an Accept header names application/json, and no image type with a higher weight."""
    accept = accept.lower()
    if "application/json" not in accept:
        return False
    json_weight = image_weight = 0.0
    for part in accept.split(","):
        name, _, parameters = part.partition(";")
        found = re.search(r"q\s*=\s*([01](?:\.\d*)?)", parameters)
        weight = float(found.group(1)) if found else 1.0
        if name.strip() == "application/json":
            json_weight = max(json_weight, weight)
        elif name.strip().startswith("image/"):
            image_weight = max(image_weight, weight)
    return json_weight > 0 and json_weight >= image_weight


def server_timing(timings: Timings) -> str:
    """The Server-Timing header: each stage and the total, in milliseconds."""
    return ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings._asdict().items())


def answer_json(delivery: Delivery, request_id: str, model: str) -> bytes:
    """The JSON answer of POST /generate (schemas.GenerateAnswer)."""
    return to_json(
        {
            "id": request_id,
            "created": int(time.time()),
            "model": model,
            "images": [
                {
                    "b64": picture.content.decode("ascii"),
                    "seed": picture.seed,
                    "width": delivery.width,
                    "height": delivery.height,
                    "format": delivery.output_format,
                }
                for picture in delivery.pictures
            ],
            "timings_ms": {stage: round(ms, 3) for stage, ms in delivery.timings_ms._asdict().items()},
            "prompt_truncated": delivery.prompt_truncated,
        }
    )
