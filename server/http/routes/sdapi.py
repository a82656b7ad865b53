"""The part of AUTOMATIC1111's API that its clients need for images, with --compat sdapi. Errors are this server's own.

Paths, bodies and answers follow stable-diffusion-webui, modules/api/api.py. There is no global state of one worker:
interrupt ends the requests of its caller alone.
"""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import FieldError, InvalidError
from server.generation.generator import GenerationResult
from server.generation.model_engines import engines_by_name
from server.http.body import read_json, read_json_object
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
from server.http.state import AppState, app_state, request_context, result_headers
from server.http.validation import excerpt

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], route_class=PlainRoute)


@dataclass(eq=False, slots=True)
class RunningRequest:
    """One request of this API, from its first job to its result."""

    caller: tuple[str, str]
    began: float  # time.monotonic()
    task: asyncio.Task[GenerationResult]
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class RunningRequests:
    """The running requests of this process, in `app.state.sdapi_requests`."""

    running: set[RunningRequest] = field(default_factory=set)

    async def run(
        self, caller: tuple[str, str], generation: Coroutine[Any, Any, GenerationResult]
    ) -> GenerationResult | None:
        """Returns the result of `generation`, or None when its caller interrupted it."""
        running = RunningRequest(caller, time.monotonic(), asyncio.create_task(generation))
        self.running.add(running)
        try:
            return await running.task
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if running.interrupted and task is not None and not task.cancelling():
                return None
            raise
        finally:
            self.running.discard(running)

    def interrupt(self, caller: tuple[str, str]) -> None:
        """Ends the requests of `caller`."""
        for request in self.running:
            if request.caller == caller:
                request.interrupted = True
                request.task.cancel()


@router.post("/txt2img", **openapi.sdapi_images(SdapiAnswer, Txt2ImgRequest))
async def txt2img(request: Request) -> Response:
    """Text to image. Accepts fields without effect on a one-step model, and names them in `info`."""
    return await _generate(request, Txt2ImgRequest)


@router.post("/img2img", **openapi.sdapi_images(SdapiAnswer, Img2ImgRequest))
async def img2img(request: Request) -> Response:
    """Image to image. No masks."""
    return await _generate(request, Img2ImgRequest)


@router.get("/options", **openapi.SDAPI_OBJECT)
async def options(request: Request) -> Response:
    """Returns the settings that clients read."""
    return JSONResponse(_options(app_state(request)))


@router.post("/options", **openapi.SDAPI_OPTIONS)
async def set_options(request: Request) -> Response:
    """Changes nothing. Accepts the name of the default checkpoint; lists other settings in `ignored`."""
    state = app_state(request)
    options, current = await read_json_object(request, state), _options(state)
    checkpoint = options.get("sd_model_checkpoint") or current["sd_model_checkpoint"]
    if checkpoint != current["sd_model_checkpoint"]:
        name = "sd_model_checkpoint"
        raise InvalidError(
            [
                FieldError(
                    name,
                    f"{name}: got {excerpt(checkpoint)}, allowed: {current[name]}; each request chooses another one in "
                    "its override_settings",
                )
            ]
        )
    return JSONResponse({"ignored": sorted(name for name, value in options.items() if current.get(name, ...) != value)})


@router.get("/sd-models", **openapi.SDAPI_LIST)
async def sd_models(request: Request) -> Response:
    """Lists the served checkpoints."""
    unknown = {"hash": None, "sha256": None, "config": None}
    names = engines_by_name(app_state(request).scheduler.engine)
    return JSONResponse([{"title": name, "model_name": name, "filename": name, **unknown} for name in names])


@router.get("/samplers", **openapi.SDAPI_LIST)
async def samplers(_: Request) -> Response:
    """Lists the one sampler; requests may name any."""
    return JSONResponse([{"name": SAMPLER, "aliases": [SAMPLER.lower()], "options": {}}])


@router.get("/progress", **openapi.SDAPI_OBJECT)
async def progress(request: Request) -> Response:
    """Returns the progress of this API's requests, estimated from the measured time of waiting jobs."""
    server, running = app_state(request), _running_requests(request).running
    done, eta_s = 0.0, 0.0
    if running:
        elapsed_s = time.monotonic() - min(one.began for one in running)
        eta_s = float(server.scheduler.retry_after_s)
        done = min(max(elapsed_s / (elapsed_s + eta_s), 0.01), 0.99)
    state = {
        "skipped": False,
        "interrupted": any(one.interrupted for one in running),
        "stopping_generation": False,
        "job": "",
        "job_count": len(running),
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 1 if running else 0,
    }
    return JSONResponse(
        {"progress": done, "eta_relative": eta_s, "state": state, "current_image": None, "textinfo": None}
    )


@router.post("/interrupt", **openapi.SDAPI_OBJECT)
async def interrupt(request: Request) -> Response:
    """Ends the caller's requests of this API (same address, same key); their answers hold no images."""
    _running_requests(request).interrupt(_caller(request))
    return JSONResponse({})


async def _generate(request: Request, model: type[Txt2ImgRequest]) -> Response:
    state = app_state(request)
    body = await read_json(request, model, state)
    image_request = body.to_request(list(engines_by_name(state.scheduler.engine)))
    generation = state.generator.generate(image_request, request_context(request).arrived)
    # AUTOMATIC1111 returns the request as well; ours omits its images.
    parameters = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"}, exclude_unset=True)
    result = await cancel_on_disconnect(_running_requests(request).run(_caller(request), generation), request)
    if result is None:
        return Response(interrupted_json(body, parameters, str(image_request.model)), media_type="application/json")
    content = await state.codec.run(answer_json, body, parameters, result)
    return Response(content, headers=result_headers(request, result), media_type="application/json")


def _options(state: AppState) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": state.scheduler.engine.info.checkpoint,
        "sd_checkpoint_hash": None,
        "samples_format": "png",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
    }


def _running_requests(request: Request) -> RunningRequests:
    requests: RunningRequests = request.app.state.sdapi_requests
    return requests


def _caller(request: Request) -> tuple[str, str]:
    address = "" if request.client is None else request.client.host
    return address, request.headers.get("authorization", "")
