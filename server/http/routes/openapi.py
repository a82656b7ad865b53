"""Additions to /openapi.json that FastAPI cannot derive: bodies read by hand, byte answers, every error."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from server.http.routes.edits import EditRequest
from server.http.routes.openai_schemas import ImageGenerationRequest, ImagesResponse, OpenAiError
from server.http.routes.schemas import GenerateAnswer, GenerateRequest, Problem

REASONS = {
    401: "API keys are set, and the request carries none of them.",
    404: "There is no such model here.",
    408: "The body did not arrive in time.",
    413: "The body is over the limit; it was not read whole.",
    415: "The body is of another media type than the route reads.",
    422: "A value is not allowed, or a check refused prompt or image (`content_policy_violation`); `errors` say which.",
    429: "The queue is full; refused at once.",
    500: "The engine failed on this request; others go on.",
    503: "Not ready yet, draining, the engine does not answer, or a check failed.",
    504: "The deadline passed before the job began; it was not run.",
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
EVERY_HEADER = {"X-Request-Id": {"schema": {"type": "string"}}}

COMPONENTS: tuple[type[BaseModel], ...] = (
    GenerateRequest,
    GenerateAnswer,
    Problem,
    ImageGenerationRequest,
    EditRequest,
    ImagesResponse,
    OpenAiError,
)


def reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def errors(*statuses: int, envelope: type[BaseModel] = Problem) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses of a route: each status with its reason, schema and headers."""
    media_type = "application/problem+json" if envelope is Problem else "application/json"
    return {
        status: {
            "description": REASONS[status],
            "content": {media_type: {"schema": reference(envelope)}},
            "headers": EVERY_HEADER | (RETRY_AFTER if status in (429, 503) else {}),
        }
        for status in statuses
    }


def json_body(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": reference(model), "examples": examples}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Replaces the app's schema by one with our components."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for model in COMPONENTS:
                model_schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(model_schema.pop("$defs", {}))
                schemas[model.__name__] = model_schema
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{}, {"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this as the way to extend the schema


def responses(
    description: str,
    content: dict[str, Any],
    *statuses: int,
    headers: dict[str, Any] = EVERY_HEADER,
    envelope: type[BaseModel] = Problem,
) -> dict[str, Any]:
    """Returns the responses of a route: 200 with `content` (media type -> schema), and the errors."""
    media_types = {media_type: {"schema": schema} for media_type, schema in content.items()}
    ok = {"description": description, "content": media_types, "headers": headers}
    return {"response_class": Response, "responses": {200: ok, **errors(*statuses, envelope=envelope)}}


TIMING_HEADERS = EVERY_HEADER | {
    "Server-Timing": {
        "description": "queue, text, denoise, decode, encode, total in ms.",
        "schema": {"type": "string"},
    },
    "X-Prompt-Truncated": {"description": "`true` where the prompt was cut.", "schema": {"type": "string"}},
}
SEED_HEADER = {"X-Seed": {"description": "With image bytes: the seed.", "schema": {"type": "integer"}}}
GENERATION_ERRORS = (401, 408, 413, 415, 422, 429, 500, 503, 504)
OBJECT = {"type": "object"}
IMAGE_BYTES = {"type": "string", "format": "binary"}
IMAGE_CONTENT = {
    "application/json": reference(GenerateAnswer),
    **dict.fromkeys(("image/png", "image/jpeg", "image/webp"), IMAGE_BYTES),
}
GENERATE: dict[str, Any] = {
    **responses("The images.", IMAGE_CONTENT, *GENERATION_ERRORS, headers=TIMING_HEADERS | SEED_HEADER),
    "openapi_extra": json_body(
        GenerateRequest,
        {
            "one": {"summary": "One image", "value": {"prompt": "a red circle on a white background", "seed": 7}},
            "four": {
                "summary": "Four variants, as JSON",
                "value": {"prompt": "three green triangles", "num_images": 4},
            },
        },
    ),
}

STATUS = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
LIVE = responses("The process answers.", {"application/json": STATUS})
READY = responses("The engine is loaded and warm.", {"application/json": STATUS}, 503)
METRICS = responses("Prometheus text format.", {"text/plain": {"type": "string"}})
INFO = responses("What runs here.", {"application/json": OBJECT}, 401, 503)

JSON_OBJECT = {"application/json": OBJECT}
MODELS = responses("The model, alone and with each adapter.", JSON_OBJECT, 401, 503, envelope=OpenAiError)
MODEL: dict[str, Any] = responses("The model.", JSON_OBJECT, 401, 404, 503, envelope=OpenAiError) | {
    "openapi_extra": {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
}
OPENAI_IMAGES = responses(
    "The images.",
    {"application/json": reference(ImagesResponse)},
    *(404, *GENERATION_ERRORS),
    headers=TIMING_HEADERS,
    envelope=OpenAiError,
)
GENERATIONS: dict[str, Any] = OPENAI_IMAGES | {
    "openapi_extra": json_body(
        ImageGenerationRequest,
        {"openai": {"summary": "As the openai client sends it", "value": {"prompt": "a blue square", "size": "auto"}}},
    )
}
EDIT_FORM = {
    "type": "object",
    "properties": {
        "image": {"type": "string", "contentMediaType": "application/octet-stream"},
        "prompt": {"type": "string", "minLength": 1},
    },
    "required": ["image", "prompt"],
    "description": "Every field of /v1/images/generations may be sent as well.",
}
EDIT_BODIES = {
    "multipart/form-data": {"schema": EDIT_FORM},
    "application/json": {"schema": reference(EditRequest)},
}
EDITS: dict[str, Any] = OPENAI_IMAGES | {"openapi_extra": {"requestBody": {"required": True, "content": EDIT_BODIES}}}


def sdapi_images(answer: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """Returns body and responses of a route that generates images from JSON, with inline schemas."""
    content = {"application/json": answer.model_json_schema()}
    return {
        **responses("The images.", content, *GENERATION_ERRORS, headers=TIMING_HEADERS),
        "openapi_extra": inline_body(body.model_json_schema()),
    }


def inline_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


AS_AUTOMATIC1111 = "As AUTOMATIC1111 has it."
SDAPI_OBJECT = responses(AS_AUTOMATIC1111, JSON_OBJECT, 401, 503)
SDAPI_LIST = responses(AS_AUTOMATIC1111, {"application/json": {"type": "array", "items": OBJECT}}, 401, 503)
SDAPI_OPTIONS: dict[str, Any] = {
    **responses("What was ignored.", JSON_OBJECT, 401, 408, 413, 415, 422, 429, 503),
    "openapi_extra": inline_body(OBJECT),
}
