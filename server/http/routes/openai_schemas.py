"""Request, answer and error bodies of OpenAI's image routes."""

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from server.errors import FieldError, InvalidError
from server.generation.generator import GenerationRequest
from server.generation.image_codec import ImageFormat
from server.http.routes.schemas import MAX_IMAGES, Options, StageTimings, Whole, _integral

Percent = Annotated[int, Field(ge=0, le=100), BeforeValidator(_integral)]

STREAM_SCHEMA: JsonDict = {"const": False}


def _null_is_absent(schema: JsonDict) -> None:
    """Adds null to the type of every optional field of a schema."""
    properties, required = schema["properties"], schema["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    for name, field in properties.items():
        if name not in required and isinstance(field, dict) and "anyOf" not in field:
            about: JsonDict = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **about}


class ImageGenerationRequest(Options):
    """Body of the OpenAI routes: OpenAI's fields and our own. Ignores unknown fields; null means absent."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_null_is_absent)

    n: Whole = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WxH, or auto: width and height.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: a data: URI.")
    output_compression: Percent | None = Field(None, description="As output_quality; it wins.")
    stream: bool = Field(
        False, json_schema_extra=STREAM_SCHEMA, description="True is refused: one step has no partial images."
    )
    user: str | None = None
    model: Any = Field(
        None,
        description="A name that /v1/models lists; CHECKPOINT:ADAPTER adds `lora`. With one checkpoint, any name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Drops nulls and a seed of -1, which means a random seed on other servers; parses `lora` of a form."""
        if not isinstance(body, dict):
            return body
        present = {name: value for name, value in body.items() if value is not None}
        if str(present.get("seed")) == "-1":
            del present["seed"]
        if isinstance(present.get("lora"), str):  # from a form
            with suppress(ValueError):
                present["lora"] = json.loads(present["lora"])
        return present

    def to_request(self, image: bytes | str | None = None) -> GenerationRequest:
        """Returns the request to generate; `image` overrides the field. Raises InvalidError (422) for a stream."""
        if self.stream:
            raise InvalidError(
                [FieldError("stream", "stream: got true, allowed: false; one step has no partial images")]
            )
        width, height = self.width, self.height
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
        quality = self.output_quality if self.output_compression is None else max(self.output_compression, 1)
        return self.generation_request(
            model=None,  # server.http.routes.openai resolves it
            num_images=self.n,
            width=width,
            height=height,
            output_quality=quality,
            image=self.image if image is None else image,
            base64=True,
        )


class OpenAiImage(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Zeros: clients expect the fields, this server counts no tokens."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImagesResponse(BaseModel):
    """Answer of the OpenAI routes; `seed` and `timings_ms` are our own fields."""

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
