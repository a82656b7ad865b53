"""AUTOMATIC1111's API, as far as its clients need it to draw, behind --compat sdapi. Errors are this server's.

(stable-diffusion-webui, modules/api/api.py: paths, bodies and answers; its one worker's global state is not copied:
interrupt ends the requests of its caller alone)
"""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import Fault, InvalidError
from server.generation.generator import GenerationResult
from server.http.body import read_json, read_object
from server.http.disconnect import cancel_on_disconnect
from server.http.plain_route import PlainRoute
from server.http.routes import openapi
from server.http.routes.sdapi_schemas import (
    SAMPLER,
    Img2ImgRequest,
    SdapiAnswer,
    Txt2ImgRequest,
    answer_json,
    interrupted_json,
)
from server.http.state import AppState, app_state, request_context
from server.http.validation import shown
from server.telemetry.timings import milliseconds, server_timing

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], route_class=PlainRoute)


@dataclass(eq=False, slots=True)
class Drawing:
    """A request under way."""

    caller: tuple[str, str]
    began: float  # time.monotonic()
    task: asyncio.Task[GenerationResult]
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Drawings:
    """Those of this process, as `app.state.drawings`."""

    under_way: set[Drawing] = field(default_factory=set)

    async def run(
        self, caller: tuple[str, str], making: Coroutine[Any, Any, GenerationResult]
    ) -> GenerationResult | None:
        """What `making` makes; None where its caller interrupted it."""
        drawing = Drawing(caller, time.monotonic(), asyncio.create_task(making))
        self.under_way.add(drawing)
        try:
            return await drawing.task
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if drawing.interrupted and asking is not None and not asking.cancelling():
                return None
            raise
        finally:
            self.under_way.discard(drawing)

    def interrupt(self, caller: tuple[str, str]) -> None:
        for drawing in self.under_way:
            if drawing.caller == caller:
                drawing.interrupted = True
                drawing.task.cancel()


@router.post("/txt2img", **openapi.answers_json(SdapiAnswer, Txt2ImgRequest))
async def txt2img(request: Request) -> Response:
    """Text to image. What has no meaning for a model of one step is taken, and named in `info`."""
    return await _draw(request, Txt2ImgRequest)


@router.post("/img2img", **openapi.answers_json(SdapiAnswer, Img2ImgRequest))
async def img2img(request: Request) -> Response:
    """Image to image. No masks."""
    return await _draw(request, Img2ImgRequest)


@router.get("/options", **openapi.SDAPI_OBJECT)
async def options(request: Request) -> Response:
    """The settings that clients look for."""
    return JSONResponse(_options(app_state(request)))


@router.post("/options", **openapi.SDAPI_OPTIONS)
async def set_options(request: Request) -> Response:
    """Changes nothing: the one checkpoint may be named, and other settings are taken and named in `ignored`."""
    service = app_state(request)
    told, present = await read_object(request, service), _options(service)
    wanted = told.get("sd_model_checkpoint") or present["sd_model_checkpoint"]
    if wanted != present["sd_model_checkpoint"]:
        name = "sd_model_checkpoint"
        raise InvalidError([Fault(name, f"{name}: got {shown(wanted)}, allowed: {present[name]}")])
    return JSONResponse({"ignored": sorted(name for name, value in told.items() if present.get(name, ...) != value)})


@router.get("/sd-models", **openapi.SDAPI_LIST)
async def sd_models(request: Request) -> Response:
    """The one checkpoint."""
    name = app_state(request).scheduler.engine.info.checkpoint
    about = {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
    return JSONResponse([about])


@router.get("/samplers", **openapi.SDAPI_LIST)
async def samplers(_: Request) -> Response:
    """The one sampler; requests may name any."""
    return JSONResponse([{"name": SAMPLER, "aliases": [SAMPLER.lower()], "options": {}}])


@router.get("/progress", **openapi.SDAPI_OBJECT)
async def progress(request: Request) -> Response:
    """How far the requests of this API are, by the measured time of what waits."""
    service, under_way = app_state(request), _drawings(request).under_way
    done, eta_s = 0.0, 0.0
    if under_way:
        elapsed_s = time.monotonic() - min(drawing.began for drawing in under_way)
        eta_s = float(service.scheduler.retry_after_s)
        done = min(max(elapsed_s / (elapsed_s + eta_s), 0.01), 0.99)
    state = {
        "skipped": False,
        "interrupted": any(drawing.interrupted for drawing in under_way),
        "stopping_generation": False,
        "job": "",
        "job_count": len(under_way),
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 1 if under_way else 0,
    }
    return JSONResponse(
        {"progress": done, "eta_relative": eta_s, "state": state, "current_image": None, "textinfo": None}
    )


@router.post("/interrupt", **openapi.SDAPI_OBJECT)
async def interrupt(request: Request) -> Response:
    """Ends the caller's requests of this API: same address, same key. They are answered, without images."""
    _drawings(request).interrupt(_caller(request))
    return JSONResponse({})


async def _draw(request: Request, model: type[Txt2ImgRequest]) -> Response:
    service = app_state(request)
    body = await read_json(request, model, service)
    checkpoint = service.scheduler.engine.info.checkpoint
    making = service.generator.generate(body.to_request(checkpoint), request_context(request).arrived)
    # The request as it came, without its images: what AUTOMATIC1111 answers, too.
    parameters = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"}, exclude_unset=True)
    made = await cancel_on_disconnect(_drawings(request).run(_caller(request), making), request.receive)
    if made is None:
        return Response(interrupted_json(body, parameters, checkpoint), media_type="application/json")
    request.state.timings = made.timings_ms  # for the trace
    told = milliseconds(made.timings_ms)
    content = await service.codec.run(answer_json, body, parameters, made, told, checkpoint)
    headers = {"server-timing": server_timing(made.timings_ms)}
    if made.prompt_truncated:
        headers["x-prompt-truncated"] = "true"
    return Response(content, headers=headers, media_type="application/json")


def _options(service: AppState) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": service.scheduler.engine.info.checkpoint,
        "sd_checkpoint_hash": None,
        "samples_format": "png",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
    }


def _drawings(request: Request) -> Drawings:
    found: Drawings = request.app.state.drawings
    return found


def _caller(request: Request) -> tuple[str, str]:
    address = "" if request.client is None else request.client.host
    return address, request.headers.get("authorization", "")
