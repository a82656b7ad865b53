"""Request and answer bodies of POST /generate, with the bounds of each field."""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from engines.types import MAX_ADAPTER_SCALE, MAX_SEED, DecoderName
from server.generation.generator import GenerationRequest
from server.generation.image_codec import ImageFormat
from server.http.validation import MAX_BASE64

REQUEST_FIELDS = frozenset(field.name for field in fields(GenerationRequest))

MAX_IMAGES = 8
MAX_PROMPT = 4000
MAX_MODEL = 4096  # characters of a name, which may be a path


def _integral(value: Any) -> Any:
    """Converts 2.0 to 2: JSON has one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_integral)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_integral)]
Scale = Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]
Milliseconds = Annotated[int, Field(ge=1, le=3_600_000), BeforeValidator(_integral)]

SIZE_SCHEMA: JsonDict = {"minimum": 32, "multipleOf": 32, "examples": [1024]}
RATIO_SCHEMA: JsonDict = {"examples": ["16:9"]}
MODEL_SCHEMA: JsonDict = {"examples": ["tiny"]}
LORA_SCHEMA: JsonDict = {"examples": [{"diamond": 1.0}]}
IMAGE_SCHEMA: JsonDict = {"contentEncoding": "base64"}


class Sampling(BaseModel):
    """The fields of every API that generates images: /generate, OpenAI's routes, live sessions."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = Field(
        None,
        max_length=MAX_MODEL,
        json_schema_extra=MODEL_SCHEMA,
        description="One of `models` in /v1/info. Null: the first one. Other fields have its limits.",
    )
    num_inference_steps: Whole = Field(1, ge=1, le=4)
    guidance_scale: float = Field(4.5, ge=1, le=10, description="The published checkpoints are trained on 4 to 5.")
    seed: Seed | None = Field(None, description="Null: random, and returned.")
    width: Whole | None = Field(None, description="Null: the checkpoint's.", json_schema_extra=SIZE_SCHEMA)
    height: Whole | None = Field(None, description="Null: the checkpoint's.", json_schema_extra=SIZE_SCHEMA)
    aspect_ratio: str | None = Field(
        None,
        max_length=8,
        json_schema_extra=RATIO_SCHEMA,
        description="Instead of width and height: the checkpoint's size of that name; /v1/info lists them.",
    )
    output_format: ImageFormat = "png"
    output_quality: Whole = Field(90, ge=1, le=100, description="For jpeg and webp.")
    lora: dict[str, Scale] | None = Field(
        None,
        json_schema_extra=LORA_SCHEMA,
        description="Adapters that were given at start, each with a scale from -4 to 4; at most four at once.",
    )

    decoder: DecoderName = Field("full", description="fast: the second decoder, if one was given at start.")

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """The adapters of `lora` with a scale other than 0."""
        return tuple((name, scale) for name, scale in (self.lora or {}).items() if scale)

    def generation_request(self, **fields: Any) -> GenerationRequest:
        """Returns these fields as a request; `fields` win over them."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name in REQUEST_FIELDS}
        return GenerationRequest(**{**own, "lora": self.adapters, **fields})


class Options(Sampling):
    """The fields that POST /generate and the OpenAI routes share."""

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
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="More than 300 tokens are cut.")


class GenerateRequest(Options):
    """Body of POST /generate. An unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"prompt": "a red circle on a white background", "seed": 7}]},
    )

    num_images: Whole = Field(1, ge=1, le=MAX_IMAGES, description="Image i uses seed + i.")


class GeneratedImage(BaseModel):
    b64: str
    seed: int
    width: int
    height: int
    format: ImageFormat


class StageTimings(BaseModel):
    """Milliseconds per stage; of several images, the maximum of each stage."""

    queue: float
    text: float
    denoise: float
    decode: float
    encode: float
    total: float
    safety: float | None = Field(None, description="Of the checks, with --safety.")


class GenerateAnswer(BaseModel):
    """Answer with `Accept: application/json`, or with several images."""

    id: str
    created: int
    model: str
    images: list[GeneratedImage]
    timings_ms: StageTimings
    prompt_truncated: bool


class ProblemFault(BaseModel):
    field: str
    pointer: str
    detail: str


class BuildingEngine(BaseModel):
    """The current step and the progress of the build; `seconds_left` is null while it is unknown."""

    module: str
    percent: int
    seconds_left: int | None


class Problem(BaseModel):
    """Every error (RFC 9457, application/problem+json).

    `code` is for programs. `errors` comes with 422, `building` with 503 while an engine is built.
    """

    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemFault] | None = None
    building: BuildingEngine | None = None
