"""The bodies of OpenAI's image routes: requests, answers and errors."""

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from server.errors import Fault, InvalidError
from server.generation.generator import GenerationRequest
from server.generation.image_codec import ImageFormat
from server.http.routes.schemas import MAX_IMAGES, MAX_PROMPT, Options, StageTimings, Whole, _integral

Percent = Annotated[int, Field(ge=0, le=100), BeforeValidator(_integral)]

STREAM_SCHEMA: JsonDict = {"const": False}


def _null_is_absent(schema: JsonDict) -> None:
    """Says in a schema that every field that need not be there may be null."""
    properties, required = schema["properties"], schema["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    for name, field in properties.items():
        if name not in required and isinstance(field, dict) and "anyOf" not in field:
            about: JsonDict = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **about}


class ImageGenerationRequest(Options):
    """Body of the OpenAI routes: OpenAI's fields and our own. Unknown fields are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_null_is_absent)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="More than 300 tokens are cut.")
    n: Whole = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WxH, or auto: width and height.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data: URI.")
    output_compression: Percent | None = Field(None, description="As output_quality; it wins.")
    stream: bool = Field(
        False, json_schema_extra=STREAM_SCHEMA, description="True is refused: one step has no partial images."
    )
    user: str | None = None
    model: Any = Field(None, description="Any name is taken; CHECKPOINT:ADAPTER, as /v1/models lists it, adds `lora`.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """A seed of -1 is how other servers write a random one."""
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if value is not None}
        if str(kept.get("seed")) == "-1":
            del kept["seed"]
        if isinstance(kept.get("lora"), str):  # a form's
            with suppress(ValueError):
                kept["lora"] = json.loads(kept["lora"])
        return kept

    def to_request(self, image: bytes | str | None = None) -> GenerationRequest:
        """`image` (that of an edit) wins over the field. Raises InvalidError (422) for a stream."""
        if self.stream:
            raise InvalidError([Fault("stream", "stream: got true, allowed: false; one step has no partial images")])
        width, height = self.width, self.height
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
        quality = self.output_quality if self.output_compression is None else max(self.output_compression, 1)
        image = self.image if image is None else image
        return self.generation_request(
            num_images=self.n, width=width, height=height, output_quality=quality, image=image, base64=True
        )


class OpenAiImage(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Tokens are not counted here; clients expect the fields."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImagesResponse(BaseModel):
    """The answer of the OpenAI routes; `seed` and `timings_ms` are ours."""

    created: int
    data: list[OpenAiImage]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    usage: Usage
    timings_ms: StageTimings


class OpenAiErrorBody(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class OpenAiError(BaseModel):
    """Every error of the OpenAI routes."""

    error: OpenAiErrorBody
