"""OpenAI's image routes; the openai client, LiteLLM and Open WebUI work unmodified.

The routes accept any `model` name, since clients send their own; `checkpoint:adapter` adds that adapter at scale 1.
They ignore unknown fields.
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

from server.errors import ClientGoneError, FieldError, HttpError, InvalidError
from server.generation.generator import GenerationRequest, GenerationResult
from server.http.body import check_media_type, media_type_of, read_json
from server.http.disconnect import cancel_on_disconnect
from server.http.plain_route import PlainRoute
from server.http.routes import openapi
from server.http.routes.edits import NO_MASK, EditRequest, embedded_image
from server.http.routes.openai_schemas import ImageGenerationRequest, Usage
from server.http.state import AppState, app_state, request_context, result_headers
from server.http.validation import excerpt, parse_form
from server.telemetry.timings import milliseconds

IMAGE_FIELDS = ("image", "image[]")
NOT_PARSED = (*IMAGE_FIELDS, "mask", "images")
NO_USAGE = Usage().model_dump()

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=PlainRoute)


@router.post("/images/generations", **openapi.GENERATIONS)
async def generations(request: Request) -> Response:
    """Text to image, with OpenAI's request and answer."""
    state = app_state(request)
    body = await read_json(request, ImageGenerationRequest, state)
    image_request = _with_model_adapter(body.to_request(), body.model, state)
    generation = state.generator.generate(image_request, request_context(request).arrived)
    response_format = body.response_format
    del body, image_request  # frees their large images as soon as they are decoded
    return await _respond(request, state, generation, response_format)


@router.post("/images/edits", **openapi.EDITS)
async def edits(request: Request) -> Response:
    """Image to image: a form with the file `image` (or `image[]`), or JSON with `images`.

    Accepts the fields of generations too, and no masks.
    """
    state = app_state(request)
    if media_type_of(request) == "application/json":
        body = await read_json(request, EditRequest, state)
        image_request = body.edit_request()
    else:
        check_media_type(request, "multipart/form-data")
        state.scheduler.check_open()
        with state.upload_limit.hold(request):
            form = await _form(request, state.settings.body_limit)
            try:
                fields = {name: value for name, value in form.items() if isinstance(value, str) and value}
                body = parse_form(EditRequest, {name: fields[name] for name in fields if name not in NOT_PARSED})
                image = await _one_image(form)
            finally:
                await form.close()
        image_request = body.to_request(image)
        del form, image
    image_request = _with_model_adapter(image_request, body.model, state)
    generation = state.generator.generate(image_request, request_context(request).arrived)
    response_format = body.response_format
    del body, image_request  # frees their large images as soon as they are decoded
    return await _respond(request, state, generation, response_format)


@router.get("/models", **openapi.MODELS)
async def models(request: Request) -> Response:
    """Lists the served model, alone and with each adapter that requests may choose."""
    return JSONResponse({"object": "list", "data": [_model_entry(name) for name in _model_names(app_state(request))]})


@router.get("/models/{name:path}", **openapi.MODEL)
async def model(request: Request) -> Response:
    """Returns one model by its id."""
    names, name = _model_names(app_state(request)), request.path_params["name"]
    if name not in names:
        raise _model_not_found(name, names)
    return JSONResponse(_model_entry(name))


def _model_names(state: AppState) -> list[str]:
    engine = state.scheduler.engine
    return [engine.info.checkpoint, *(f"{engine.info.checkpoint}:{name}" for name in engine.limits.adapters)]


def _model_entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sana-sprint-server"}


def _model_not_found(name: object, names: list[str]) -> HttpError:
    return HttpError(404, f"model: got {excerpt(name)}, allowed: {', '.join(names)}", code="model_not_found")


def _with_model_adapter(request: GenerationRequest, model: object, state: AppState) -> GenerationRequest:
    """Adds the adapter that `model` names; its scale in `lora` has precedence over 1.

    Raises HttpError (404) for an unknown adapter.
    """
    names = _model_names(state)
    if not isinstance(model, str) or not model.startswith(f"{names[0]}:"):
        return request
    if model not in names:
        raise _model_not_found(model, names)
    adapter = model.removeprefix(f"{names[0]}:")
    return replace(request, lora=tuple({adapter: 1.0, **dict(request.lora)}.items()))


async def _respond(
    request: Request, state: AppState, generation: Coroutine[Any, Any, GenerationResult], response_format: str
) -> Response:
    result = await cancel_on_disconnect(generation, request.receive)
    headers = result_headers(request, result)
    content = await state.codec.run(images_json, result, response_format)
    return Response(content, headers=headers, media_type="application/json")


async def _form(request: Request, max_bytes: int) -> FormData:
    """Returns the form. Keeps it in memory: no upload touches the disk."""
    parser = MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=64, max_part_size=max_bytes)
    parser.spool_max_size = max_bytes + 1
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidError([FieldError("body", f"body: {error.message}; allowed: multipart/form-data")]) from error
    except ClientDisconnect as error:
        raise ClientGoneError("the client left before its body was complete") from error


async def _one_image(form: FormData) -> bytes | str:
    """Returns the image file of the form, or its text (base64, a data: URL). Ignores empty fields and files."""
    for value in form.getlist("mask"):
        if not _is_empty(value):
            raise InvalidError([FieldError("mask", NO_MASK)])
    images = [value for name in IMAGE_FIELDS for value in form.getlist(name) if not _is_empty(value)]
    if len(images) != 1:
        raise InvalidError(
            [FieldError("image", f"image: got {len(images)} files, allowed: one png, jpeg or webp file")]
        )
    return await images[0].read() if isinstance(images[0], UploadFile) else embedded_image("image", images[0])


def _is_empty(value: UploadFile | str) -> bool:
    return not (value.size if isinstance(value, UploadFile) else value)


def images_json(result: GenerationResult, response_format: str) -> bytes:
    """Returns the JSON body of an answer (openai_schemas.ImagesResponse)."""
    data: list[dict[str, object]] = []
    for image in result.images:
        text = image.content.decode("ascii")
        content = {"b64_json": text}
        if response_format == "url":
            content = {"url": f"data:image/{result.output_format};base64,{text}"}
        data.append({**content, "seed": image.seed})
    return to_json(
        {
            "created": int(time.time()),
            "data": data,
            "background": "opaque",
            "output_format": result.output_format,
            "size": f"{result.width}x{result.height}",
            "usage": NO_USAGE,
            "timings_ms": milliseconds(result.timings_ms),
        }
    )
