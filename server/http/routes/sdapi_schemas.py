"""Bodies of AUTOMATIC1111's API, and their mapping to a one-step model.

Fields follow stable-diffusion-webui, modules/api/models.py; clients send some forty, most with their defaults.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from engines.types import MAX_SEED, DecoderName
from server.errors import FieldError, InvalidError
from server.generation.generator import GenerationRequest, GenerationResult
from server.generation.image_codec import ImageFormat
from server.http.routes.edits import NO_MASK
from server.http.routes.schemas import MAX_IMAGES, MAX_PROMPT
from server.http.validation import excerpt
from server.telemetry.timings import milliseconds

MAX_STEPS = 4
GUIDANCE = (1.0, 10.0)
WITHOUT_EFFECT = ("negative_prompt",)  # among the fields below
SAMPLER = "Sprint"
ONE_UNIT = "alwayson_scripts.controlnet: got {} units with an image, allowed: one"


class Txt2ImgRequest(BaseModel):
    """Body of /sdapi/v1/txt2img. Null means absent. Accepts other fields, and names them in the answer's `info`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="Has no effect: guidance is distilled.")
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random, and returned.")
    steps: int = Field(1, ge=1, le=1000, description="More than 4 are meant for other models: this server runs 1 then.")
    cfg_scale: float = Field(4.5, ge=0, le=100, description="Clipped to 1 to 10.")
    width: int | None = Field(None, ge=1, le=100_000, description="Null: the checkpoint's.")
    height: int | None = Field(None, ge=1, le=100_000, description="Null: the checkpoint's.")
    batch_size: int = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES, description="batch_size x n_iter images, 8 at most.")
    denoising_strength: float = Field(0.75, ge=0, le=1, description="Of img2img.")
    decoder: DecoderName = Field("full", description="Our own: fast is the second decoder, if one was given at start.")
    send_images: bool = True
    script_name: str = Field("", description="None is accepted.")
    alwayson_scripts: dict[str, Any] = Field({}, description="Of `controlnet`, one unit with an image.")
    override_settings: dict[str, Any] = Field({}, description="`sd_model_checkpoint` and `samples_format`.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @property
    def count(self) -> int:
        return self.batch_size * self.n_iter

    @property
    def run_steps(self) -> int:
        return self.steps if self.steps <= MAX_STEPS else 1

    @property
    def run_guidance(self) -> float:
        return min(max(self.cfg_scale, GUIDANCE[0]), GUIDANCE[1])

    def to_request(self, models: Sequence[str]) -> GenerationRequest:
        """Returns the request for the generator; `models` are the served ones, the default first.

        Raises InvalidError (422) for effective fields with bad values.
        """
        details = []
        if self.count > MAX_IMAGES:
            details.append(f"batch_size: got {self.batch_size} x {self.n_iter} images, allowed: at most {MAX_IMAGES}")
        if self.script_name:
            details.append(f"script_name: got {excerpt(self.script_name)}, allowed: none; there are no scripts here")
        requested = self.override_settings.get("sd_model_checkpoint") or models[0]
        if requested not in models:
            details.append(f"sd_model_checkpoint: got {excerpt(requested)}, allowed: {', '.join(models)}")
        if details:
            raise InvalidError([FieldError(detail.partition(":")[0], detail) for detail in details])
        control_image, control_scale = self._control()
        return GenerationRequest(
            prompt=self.prompt,
            model=requested,
            num_images=self.count,
            num_inference_steps=self.run_steps,
            guidance_scale=self.run_guidance,
            seed=None if self.seed == -1 else self.seed,
            width=self.width,
            height=self.height,
            output_format=self._format(),
            control_image=control_image,
            control_scale=control_scale,
            decoder=self.decoder,
            base64=True,
        )

    def ignored(self) -> list[str]:
        """Returns the names of the fields that were sent and have no effect."""
        effective = set(Txt2ImgRequest.model_fields) - set(WITHOUT_EFFECT)
        scripts = [f"alwayson_scripts.{name}" for name in self.alwayson_scripts if name.lower() != "controlnet"]
        settings = set(self.override_settings) - {"sd_model_checkpoint", "samples_format"}
        names = (self.model_fields_set | set(self.model_extra or {})) - effective - set(self._effective())
        return sorted([*names, *scripts, *(f"override_settings.{name}" for name in settings)])

    def changed(self) -> dict[str, dict[str, float]]:
        """Returns the numbers that were clipped to this model's range: name -> asked, used."""
        used: dict[str, float] = {"steps": self.run_steps, "cfg_scale": self.run_guidance}
        pairs = {name: (getattr(self, name), value) for name, value in used.items()}
        return {name: {"asked": asked, "used": value} for name, (asked, value) in pairs.items() if asked != value}

    def _effective(self) -> Sequence[str]:
        """Returns the effective fields of a subclass."""
        return ()

    def _format(self) -> ImageFormat:
        name = str(self.override_settings.get("samples_format", "png")).lower().replace("jpg", "jpeg")
        formats: tuple[ImageFormat, ...] = get_args(ImageFormat)
        for image_format in formats:
            if image_format == name:
                return image_format
        detail = f"samples_format: got {excerpt(name)}, allowed: {', '.join(formats)}"
        raise InvalidError([FieldError("samples_format", detail)])

    def _control(self) -> tuple[str | None, float]:
        """Returns strokes and weight from the arguments of the extension sd-webui-controlnet."""
        units: list[dict[str, Any]] = []
        for name, script in self.alwayson_scripts.items():
            arguments = script.get("args") if isinstance(script, dict) and name.lower() == "controlnet" else None
            if isinstance(arguments, list):
                units += [unit for unit in arguments if isinstance(unit, dict) and unit.get("enabled", True)]
        drawn = [(image, unit) for unit in units if (image := unit.get("image") or unit.get("input_image"))]
        if not drawn:
            return None, 1.0
        (image, unit), *more = drawn
        weight = unit.get("weight", 1.0)
        field = "alwayson_scripts.controlnet"
        if more:
            raise InvalidError([FieldError(field, ONE_UNIT.format(len(drawn)))])
        if not isinstance(image, str) or not isinstance(weight, int | float) or not 0 <= weight <= 2:
            raise InvalidError(
                [FieldError(field, f"{field}: got a unit of other form, allowed: base64, a weight of 0 to 2")]
            )
        return image, float(weight)


class Img2ImgRequest(Txt2ImgRequest):
    """Body of /sdapi/v1/img2img: the fields of txt2img, and one image."""

    init_images: list[Any] = Field(description="One, as base64 or a data: URL.")
    mask: Any = Field(None, description="None is accepted.")

    def to_request(self, models: Sequence[str]) -> GenerationRequest:
        """Returns the request for the generator; without a size the result keeps the shape of `init_images[0]`."""
        if self.mask:
            raise InvalidError([FieldError("mask", NO_MASK)])
        if len(self.init_images) != 1 or not isinstance(self.init_images[0], str):
            got = f"init_images: got {len(self.init_images)} of them, allowed: one, as base64 or a data: URL"
            raise InvalidError([FieldError("init_images", got)])
        request = super().to_request(models)
        return replace(request, image=self.init_images[0], strength=self.denoising_strength, keeps_shape=True)

    def _effective(self) -> Sequence[str]:
        return ("init_images", "mask")


class SdapiAnswer(BaseModel):
    """Answer of both routes. `info` is JSON as text; `ignored`, `changed` and `timings_ms` in it are our own."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def answer_json(body: Txt2ImgRequest, parameters: dict[str, Any], result: GenerationResult) -> bytes:
    """Returns the JSON body of both routes (SdapiAnswer)."""
    seeds = [image.seed for image in result.images]
    text = f"{body.prompt}\nSteps: {body.run_steps}, Sampler: {SAMPLER}, CFG scale: {body.run_guidance:g}, Seed: "
    size = f", Size: {result.width}x{result.height}, Model: {result.model}"
    info = {
        **_common_info(body, result.model),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "width": result.width,
        "height": result.height,
        "infotexts": [f"{text}{seed}{size}" for seed in seeds],
        "prompt_truncated": result.prompt_truncated,
        "timings_ms": milliseconds(result.timings_ms),
    }
    images = [image.content.decode("ascii") for image in result.images] if body.send_images else []
    return to_json({"images": images, "parameters": parameters, "info": to_json(info).decode()})


def interrupted_json(body: Txt2ImgRequest, parameters: dict[str, Any], model: str) -> bytes:
    """Returns the JSON body for a request that POST /sdapi/v1/interrupt ended."""
    info = {**_common_info(body, model), "all_seeds": [], "interrupted": True}
    return to_json({"images": [], "parameters": parameters, "info": to_json(info).decode()})


def _common_info(body: Txt2ImgRequest, model: str) -> dict[str, Any]:
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * body.count,
        "negative_prompt": "",
        "all_negative_prompts": [""] * body.count,
        "steps": body.run_steps,
        "cfg_scale": body.run_guidance,
        "sampler_name": SAMPLER,
        "batch_size": body.batch_size,
        "sd_model_name": model,
        "sd_model_hash": None,
        "index_of_first_image": 0,
        "extra_generation_params": {},
        "ignored": body.ignored(),
        "changed": body.changed(),
    }
