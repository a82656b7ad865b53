"""OpenAI's image routes; the openai client, LiteLLM and Open WebUI work unmodified.

`model` is a checkpoint or `checkpoint:adapter`, which adds that adapter at scale 1. A server of one checkpoint accepts
any other name too, since clients send their own. The routes ignore unknown fields.
"""

import time
from collections.abc import Coroutine, Iterable
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
from server.generation.model_engines import engines_by_name
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
    image_request = _with_model(body.to_request(), body.model, state)
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
    image_request = _with_model(image_request, body.model, state)
    generation = state.generator.generate(image_request, request_context(request).arrived)
    response_format = body.response_format
    del body, image_request  # frees their large images as soon as they are decoded
    return await _respond(request, state, generation, response_format)


@router.get("/models", **openapi.MODELS)
async def models(request: Request) -> Response:
    """Lists the served models, each alone and with each adapter that requests may choose."""
    return JSONResponse({"object": "list", "data": [_model_entry(name) for name in _models(app_state(request))]})


@router.get("/models/{name:path}", **openapi.MODEL)
async def model(request: Request) -> Response:
    """Returns one model by its id."""
    names, name = _models(app_state(request)), request.path_params["name"]
    if name not in names:
        raise _model_not_found(name, names)
    return JSONResponse(_model_entry(name))


def _models(state: AppState) -> dict[str, tuple[str, str | None]]:
    """Returns id -> checkpoint and adapter, the default checkpoint first."""
    models: dict[str, tuple[str, str | None]] = {}
    for name, engine in engines_by_name(state.scheduler.engine).items():
        models |= {name: (name, None), **{f"{name}:{each}": (name, each) for each in engine.limits.adapters}}
    return models


def _model_entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sana-sprint-server"}


def _model_not_found(name: object, names: Iterable[str]) -> HttpError:
    return HttpError(404, f"model: got {excerpt(name)}, allowed: {', '.join(names)}", code="model_not_found")


def _with_model(request: GenerationRequest, model: object, state: AppState) -> GenerationRequest:
    """Adds checkpoint and adapter that `model` names; the adapter's scale in `lora` has precedence over 1.

    Raises HttpError (404) for an unknown model if several checkpoints are served, and for an unknown adapter.
    """
    if model in (None, ""):
        return request
    models = _models(state)
    if not isinstance(model, str) or model not in models:
        several = len({name for name, _ in models.values()}) > 1
        if several or (isinstance(model, str) and model.startswith(f"{next(iter(models))}:")):
            raise _model_not_found(model, models)
        return request
    name, adapter = models[model]
    added = {} if adapter is None else {adapter: 1.0}
    return replace(request, model=name, lora=tuple({**added, **dict(request.lora)}.items()))


async def _respond(
    request: Request, state: AppState, generation: Coroutine[Any, Any, GenerationResult], response_format: str
) -> Response:
    result = await cancel_on_disconnect(generation, request)
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
