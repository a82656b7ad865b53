"""OpenAI's image routes, so that the openai client, LiteLLM and Open WebUI work unmodified.

Any `model` name is taken, since clients insist on their own, but `checkpoint:adapter` adds that adapter at scale 1.
Unknown fields are ignored.
"""

import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from server.errors import ClientGoneError, Fault, HttpError, InvalidError
from server.generation.generator import GenerationRequest, GenerationResult
from server.http.body import check_media_type, media_type_of, read_json
from server.http.disconnect import cancel_on_disconnect
from server.http.plain_route import PlainRoute
from server.http.routes import openapi
from server.http.routes.edits import NO_MASK, EditRequest, embedded
from server.http.routes.openai_schemas import ImageGenerationRequest, Usage
from server.http.state import AppState, app_state, request_context
from server.http.validation import parse_form, shown
from server.telemetry.timings import milliseconds, server_timing

IMAGE_FIELDS = ("image", "image[]")
NOT_PARSED = (*IMAGE_FIELDS, "mask", "images")
NO_USAGE = Usage().model_dump()

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=PlainRoute)


@router.post("/images/generations", **openapi.GENERATIONS)
async def generations(request: Request) -> Response:
    """Text to image, as OpenAI has it."""
    service = app_state(request)
    body = await read_json(request, ImageGenerationRequest, service)
    making = service.generator.generate(
        _adapted(body.to_request(), body.model, service), request_context(request).arrived
    )
    response_format = body.response_format
    del body  # it may hold large images, which are not needed once they are decoded
    return await _answer(request, service, making, response_format)


@router.post("/images/edits", **openapi.EDITS)
async def edits(request: Request) -> Response:
    """Image to image: a form with the file `image` (or `image[]`), or JSON with `images`; and the fields of
    generations. No masks."""
    service = app_state(request)
    if media_type_of(request) == "application/json":
        body = await read_json(request, EditRequest, service)
        order = body.edit()
    else:
        check_media_type(request, "multipart/form-data")
        service.scheduler.check_open()
        with service.uploads.one(request):
            form = await _form(request, service.settings.body_limit)
            try:
                fields = {name: value for name, value in form.items() if isinstance(value, str) and value}
                body = parse_form(EditRequest, {name: fields[name] for name in fields if name not in NOT_PARSED})
                image = await _one_image(form)
            finally:
                await form.close()
        order = body.to_request(image)
        del form, image
    order = _adapted(order, body.model, service)
    making = service.generator.generate(order, request_context(request).arrived)
    response_format = body.response_format
    del body, order  # they may hold large images, which are not needed once they are decoded
    return await _answer(request, service, making, response_format)


@router.get("/models", **openapi.MODELS)
async def models(request: Request) -> Response:
    """The model that runs here, alone and with each adapter that requests may choose."""
    return JSONResponse({"object": "list", "data": [_model(name) for name in _names(app_state(request))]})


@router.get("/models/{name:path}", **openapi.MODEL)
async def model(request: Request) -> Response:
    """That model, by its id."""
    names, name = _names(app_state(request)), request.path_params["name"]
    if name not in names:
        raise _no_model(name, names)
    return JSONResponse(_model(name))


def _names(service: AppState) -> list[str]:
    engine = service.scheduler.engine
    return [engine.info.checkpoint, *(f"{engine.info.checkpoint}:{name}" for name in engine.limits.adapters)]


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sana-sprint-server"}


def _no_model(name: object, names: list[str]) -> HttpError:
    return HttpError(404, f"model: got {shown(name)}, allowed: {', '.join(names)}", code="model_not_found")


def _adapted(order: GenerationRequest, model: object, service: AppState) -> GenerationRequest:
    """The order with the adapter that `model` names; `lora` says its scale where both do. Raises HttpError (404) for
    an adapter that is not there."""
    names = _names(service)
    if not isinstance(model, str) or not model.startswith(f"{names[0]}:"):
        return order
    if model not in names:
        raise _no_model(model, names)
    adapter = model.removeprefix(f"{names[0]}:")
    return replace(order, lora=tuple({adapter: 1.0, **dict(order.lora)}.items()))


async def _answer(
    request: Request, service: AppState, making: Coroutine[Any, Any, GenerationResult], response_format: str
) -> Response:
    delivery = await cancel_on_disconnect(making, request.receive)
    request.state.timings = delivery.timings_ms  # for the trace
    headers = {"server-timing": server_timing(delivery.timings_ms)}
    if delivery.prompt_truncated:
        headers["x-prompt-truncated"] = "true"
    content = await service.codec.run(images_json, delivery, response_format)
    return Response(content, headers=headers, media_type="application/json")


async def _form(request: Request, most_bytes: int) -> FormData:
    """The form, kept in memory: nothing that a client sends touches the disk."""
    parser = MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=64, max_part_size=most_bytes)
    parser.spool_max_size = most_bytes + 1
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidError([Fault("body", f"body: {error.message}; allowed: multipart/form-data")]) from error
    except ClientDisconnect as error:
        raise ClientGoneError("the client left before its body was complete") from error


async def _one_image(form: FormData) -> bytes | str:
    """The file of the form, or the text of one (base64, a data: URL). Fields and files without content do not count."""
    for value in form.getlist("mask"):
        if not _is_empty(value):
            raise InvalidError([Fault("mask", NO_MASK)])
    images = [value for name in IMAGE_FIELDS for value in form.getlist(name) if not _is_empty(value)]
    if len(images) != 1:
        raise InvalidError([Fault("image", f"image: got {len(images)} files, allowed: one png, jpeg or webp file")])
    return await images[0].read() if isinstance(images[0], UploadFile) else embedded("image", images[0])


def _is_empty(value: UploadFile | str) -> bool:
    return not (value.size if isinstance(value, UploadFile) else value)


def images_json(delivery: GenerationResult, response_format: str) -> bytes:
    """The JSON answer of the OpenAI routes (schemas.ImagesResponse)."""
    data: list[dict[str, object]] = []
    for picture in delivery.images:
        text = picture.content.decode("ascii")
        shown = {"b64_json": text}
        if response_format == "url":
            shown = {"url": f"data:image/{delivery.output_format};base64,{text}"}
        data.append({**shown, "seed": picture.seed})
    return to_json(
        {
            "created": int(time.time()),
            "data": data,
            "background": "opaque",
            "output_format": delivery.output_format,
            "size": f"{delivery.width}x{delivery.height}",
            "usage": NO_USAGE,
            "timings_ms": milliseconds(delivery.timings_ms),
        }
    )
