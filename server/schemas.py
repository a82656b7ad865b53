"""The bodies of requests and answers, with the contract's bounds, and the sentences for values outside them."""

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails

from engines.types import MAX_SEED
from server.codec import MAX_IMAGE_BYTES, ImageFormat
from server.errors import Fault, InvalidError
from server.generation import Order

MAX_IMAGES = 8
MAX_PROMPT = 4000
MAX_BASE64 = MAX_IMAGE_BYTES * 4 // 3 + 2**20  # room for line breaks and a data: prefix; the codec counts bytes

SHOWN = 80  # characters of a bad value that an error repeats


def _integral(value: Any) -> Any:
    """JSON knows one kind of number: 2.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_integral)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_integral)]
Milliseconds = Annotated[int, Field(ge=1, le=3_600_000), BeforeValidator(_integral)]
Percent = Annotated[int, Field(ge=0, le=100), BeforeValidator(_integral)]
Body = TypeVar("Body", bound=BaseModel)

SIZE_SCHEMA: JsonDict = {"minimum": 32, "multipleOf": 32, "examples": [1024]}
IMAGE_SCHEMA: JsonDict = {"contentEncoding": "base64"}
STREAM_SCHEMA: JsonDict = {"const": False}


class Sampling(BaseModel):
    """What every way to ask for a picture understands."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    num_inference_steps: Whole = Field(1, ge=1, le=4)
    guidance_scale: float = Field(4.5, ge=1, le=10, description="The published checkpoints are trained on 4 to 5.")
    seed: Seed | None = Field(None, description="Null: random, and returned.")
    width: Whole | None = Field(None, description="Null: the checkpoint's.", json_schema_extra=SIZE_SCHEMA)
    height: Whole | None = Field(None, description="Null: the checkpoint's.", json_schema_extra=SIZE_SCHEMA)
    output_format: ImageFormat = "png"
    output_quality: Whole = Field(90, ge=1, le=100, description="For jpeg and webp.")


class Options(Sampling):
    """What both POST /generate and the OpenAI routes understand."""

    image: str | None = Field(
        None,
        max_length=MAX_BASE64,
        json_schema_extra=IMAGE_SCHEMA,
        description="Image-to-image: base64 of a png, jpeg or webp of at most 2048x2048 and 8 MiB.",
    )
    strength: float = Field(0.5, ge=0, le=1, description="How far to go from `image`: 1 keeps a trace of it.")
    control_image: str | None = Field(
        None,
        max_length=MAX_BASE64,
        json_schema_extra=IMAGE_SCHEMA,
        description="White strokes on black; base64, bounds as for `image`. Needs a ControlNet.",
    )
    control_scale: float = Field(1.0, ge=0, le=2, description="Weight of `control_image`.")
    timeout_ms: Milliseconds | None = Field(
        None, description="A request that cannot start by then gets 504. Null: the server's."
    )


class GenerateRequest(Options):
    """Body of POST /generate. An unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"prompt": "a red circle on a white background", "seed": 7}]},
    )

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="More than 300 tokens are cut.")
    num_images: Whole = Field(1, ge=1, le=MAX_IMAGES, description="Image i uses seed + i.")

    def order(self, *, base64: bool) -> Order:
        return Order(
            prompt=self.prompt,
            count=self.num_images,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            width=self.width,
            height=self.height,
            output_format=self.output_format,
            output_quality=self.output_quality,
            image=self.image,
            strength=self.strength,
            control_image=self.control_image,
            control_scale=self.control_scale,
            timeout_ms=self.timeout_ms,
            base64=base64,
        )


class GeneratedImage(BaseModel):
    b64: str
    seed: int
    width: int
    height: int
    format: ImageFormat


class StageTimings(BaseModel):
    """Milliseconds; of several images, the slowest in each stage."""

    queue: float
    text: float
    denoise: float
    decode: float
    encode: float
    total: float


class GenerateAnswer(BaseModel):
    """The answer with `Accept: application/json`, or for several images."""

    id: str
    created: int
    model: str
    images: list[GeneratedImage]
    timings_ms: StageTimings
    prompt_truncated: bool


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

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """A seed of -1 is how other servers write a random one."""
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if value is not None}
        if str(kept.get("seed")) == "-1":
            del kept["seed"]
        return kept

    def order(self, image: bytes | str | None = None) -> Order:
        """`image` (that of an edit) wins over the field. Raises InvalidError (422) for a stream."""
        if self.stream:
            raise InvalidError([Fault("stream", "stream: got true, allowed: false; one step has no partial images")])
        width, height = self.width, self.height
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
        quality = self.output_quality if self.output_compression is None else max(self.output_compression, 1)
        return Order(
            prompt=self.prompt,
            count=self.n,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            width=width,
            height=height,
            output_format=self.output_format,
            output_quality=quality,
            image=self.image if image is None else image,
            strength=self.strength,
            control_image=self.control_image,
            control_scale=self.control_scale,
            timeout_ms=self.timeout_ms,
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


class ProblemFault(BaseModel):
    field: str
    pointer: str
    detail: str


class Problem(BaseModel):
    """Every error (RFC 9457, application/problem+json). `code` is for programs, `errors` comes with 422."""

    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemFault] | None = None


class OpenAiErrorBody(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class OpenAiError(BaseModel):
    """Every error of the OpenAI routes."""

    error: OpenAiErrorBody


def parse(model: type[Body], body: bytes) -> Body:
    """The validated body. Raises InvalidError (422) that names each bad field, its value and what is allowed."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refused(model, error) from None  # its text repeats prompts, and a log must not


def parse_form(model: type[Body], fields: dict[str, str]) -> Body:
    """As `parse`, of a form, where every value is text."""
    try:
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _refused(model, error) from None


def _refused(model: type[BaseModel], error: ValidationError) -> InvalidError:
    return InvalidError([_fault(model, detail) for detail in error.errors(include_url=False)])


def _fault(model: type[BaseModel], error: ErrorDetails) -> Fault:
    kind, field = error["type"], ".".join(str(part) for part in error["loc"])
    if not field:
        expected = "a JSON object" if kind == "model_type" else "valid JSON in UTF-8"
        return Fault("body", f"body: {error['msg'][:SHOWN]}; allowed: {expected}")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(field, model.model_fields, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return Fault(field[:SHOWN], f"{field[:SHOWN]}: unknown field; {hint}allowed: {', '.join(model.model_fields)}")
    got = "nothing" if kind == "missing" else shown(error["input"])
    return Fault(field, f"{field}: got {got}, allowed: {allowed(model, field)}")


def shown(value: object) -> str:
    """A bad value as an error repeats it: short, and long text by its length alone."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{len(value)} characters"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def allowed(model: type[BaseModel], field: str) -> str:
    """What a field may be, in words, from its JSON schema."""
    schema = model.model_json_schema()["properties"][field]
    choices = schema.get("anyOf", [schema])
    rule = schema | choices[0]  # of `x | None`, x comes first
    nullable = " or null" if len(choices) > 1 else ""
    if "enum" in rule:
        return ", ".join(map(str, rule["enum"])) + nullable
    if "pattern" in rule:
        return f"text like {rule['pattern']}{nullable}"
    if rule["type"] == "string":
        return f"a string of {rule.get('minLength', 0)} to {rule.get('maxLength', MAX_BASE64)} characters{nullable}"
    noun = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}[rule["type"]]
    if "multipleOf" in rule:
        noun += f", a multiple of {rule['multipleOf']}"
    if "maximum" in rule:
        noun += f" from {rule['minimum']} to {rule['maximum']}"
    return noun + nullable
