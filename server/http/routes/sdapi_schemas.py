"""The bodies of AUTOMATIC1111's API, and what of them has a meaning for a model of one step.

Fields as in stable-diffusion-webui, modules/api/models.py; clients send some forty of them, most at their defaults.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from engines.types import MAX_SEED
from server.errors import Fault, InvalidError
from server.generation.generator import GenerationRequest, GenerationResult
from server.generation.image_codec import ImageFormat
from server.http.routes.schemas import MAX_IMAGES, MAX_PROMPT
from server.http.validation import shown

MAX_STEPS = 4
GUIDANCE = (1.0, 10.0)
WITHOUT_EFFECT = ("negative_prompt",)  # of the fields below
SAMPLER = "Sprint"
NO_MASK = "mask: got a mask, allowed: none; this model repaints the whole image"
ONE_UNIT = "alwayson_scripts.controlnet: got {} units with an image, allowed: one"


class Txt2ImgRequest(BaseModel):
    """Body of /sdapi/v1/txt2img. Null means absent; other fields are taken, and named in the answer's `info`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="Has no effect: guidance is distilled.")
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random, and returned.")
    steps: int = Field(1, ge=1, le=1000, description="More than 4 are meant for other models: 1 is run then.")
    cfg_scale: float = Field(4.5, ge=0, le=100, description="Brought into 1 to 10.")
    width: int | None = Field(None, ge=1, le=100_000, description="Null: the checkpoint's.")
    height: int | None = Field(None, ge=1, le=100_000, description="Null: the checkpoint's.")
    batch_size: int = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES, description="batch_size x n_iter images, 8 at most.")
    denoising_strength: float = Field(0.75, ge=0, le=1, description="Of img2img.")
    send_images: bool = True
    script_name: str = Field("", description="None is taken.")
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

    def to_request(self, checkpoint: str) -> GenerationRequest:
        """Raises InvalidError (422) for what has a meaning and cannot be done."""
        faults = []
        if self.count > MAX_IMAGES:
            faults.append(f"batch_size: got {self.batch_size} x {self.n_iter} images, allowed: at most {MAX_IMAGES}")
        if self.script_name:
            faults.append(f"script_name: got {shown(self.script_name)}, allowed: none; there are no scripts here")
        wanted = self.override_settings.get("sd_model_checkpoint") or checkpoint
        if wanted != checkpoint:
            faults.append(f"sd_model_checkpoint: got {shown(wanted)}, allowed: {checkpoint}")
        if faults:
            raise InvalidError([Fault(fault.partition(":")[0], fault) for fault in faults])
        control, scale = self._control()
        return GenerationRequest(
            prompt=self.prompt,
            num_images=self.count,
            num_inference_steps=self.run_steps,
            guidance_scale=self.run_guidance,
            seed=None if self.seed == -1 else self.seed,
            width=self.width,
            height=self.height,
            output_format=self._format(),
            control_image=control,
            control_scale=scale,
            base64=True,
        )

    def ignored(self) -> list[str]:
        """Names of what was sent and has no effect here."""
        effective = set(Txt2ImgRequest.model_fields) - set(WITHOUT_EFFECT)
        scripts = [f"alwayson_scripts.{name}" for name in self.alwayson_scripts if name.lower() != "controlnet"]
        settings = set(self.override_settings) - {"sd_model_checkpoint", "samples_format"}
        names = (self.model_fields_set | set(self.model_extra or {})) - effective - set(self._effective())
        return sorted([*names, *scripts, *(f"override_settings.{name}" for name in settings)])

    def changed(self) -> dict[str, dict[str, float]]:
        """Numbers that were asked for and brought into what this model runs: name -> asked, used."""
        used: dict[str, float] = {"steps": self.run_steps, "cfg_scale": self.run_guidance}
        pairs = {name: (getattr(self, name), value) for name, value in used.items()}
        return {name: {"asked": asked, "used": value} for name, (asked, value) in pairs.items() if asked != value}

    def _effective(self) -> Sequence[str]:
        """Fields of a subclass that have an effect."""
        return ()

    def _format(self) -> ImageFormat:
        name = str(self.override_settings.get("samples_format", "png")).lower().replace("jpg", "jpeg")
        found = [known for known in get_args(ImageFormat) if known == name]
        if not found:
            allowed = ", ".join(get_args(ImageFormat))
            raise InvalidError([Fault("samples_format", f"samples_format: got {shown(name)}, allowed: {allowed}")])
        image_format: ImageFormat = found[0]
        return image_format

    def _control(self) -> tuple[str | None, float]:
        """The strokes and their weight, of the extension sd-webui-controlnet as its clients send them."""
        units: list[dict[str, Any]] = []
        for name, script in self.alwayson_scripts.items():
            arguments = script.get("args") if isinstance(script, dict) and name.lower() == "controlnet" else None
            if isinstance(arguments, list):
                units += [unit for unit in arguments if isinstance(unit, dict) and unit.get("enabled", True)]
        given = [(image, unit) for unit in units if (image := unit.get("image") or unit.get("input_image"))]
        if not given:
            return None, 1.0
        (image, unit), *more = given
        weight = unit.get("weight", 1.0)
        field = "alwayson_scripts.controlnet"
        if more:
            raise InvalidError([Fault(field, ONE_UNIT.format(len(given)))])
        if not isinstance(image, str) or not isinstance(weight, int | float) or not 0 <= weight <= 2:
            raise InvalidError(
                [Fault(field, f"{field}: got a unit of other form, allowed: base64, a weight of 0 to 2")]
            )
        return image, float(weight)


class Img2ImgRequest(Txt2ImgRequest):
    """Body of /sdapi/v1/img2img: that of txt2img, and one image."""

    init_images: list[Any] = Field(description="One, as base64 or a data: URL.")
    mask: Any = Field(None, description="None is taken.")

    def to_request(self, checkpoint: str) -> GenerationRequest:
        """Without a size the picture keeps the shape of its image."""
        if self.mask:
            raise InvalidError([Fault("mask", NO_MASK)])
        if len(self.init_images) != 1 or not isinstance(self.init_images[0], str):
            got = f"init_images: got {len(self.init_images)} of them, allowed: one, as base64 or a data: URL"
            raise InvalidError([Fault("init_images", got)])
        plain = super().to_request(checkpoint)
        return replace(plain, image=self.init_images[0], strength=self.denoising_strength, keeps_shape=True)

    def _effective(self) -> Sequence[str]:
        return ("init_images", "mask")


class SdapiAnswer(BaseModel):
    """`info` is JSON in a text, as AUTOMATIC1111 has it; `ignored`, `changed` and `timings_ms` in it are ours."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def answer_json(
    body: Txt2ImgRequest, parameters: dict[str, Any], made: GenerationResult, timings_ms: dict[str, float], model: str
) -> bytes:
    """The answer of both routes (SdapiAnswer)."""
    seeds = [image.seed for image in made.images]
    text = f"{body.prompt}\nSteps: {body.run_steps}, Sampler: {SAMPLER}, CFG scale: {body.run_guidance:g}, Seed: "
    size = f", Size: {made.width}x{made.height}, Model: {model}"
    info = {
        **_about(body, model),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "width": made.width,
        "height": made.height,
        "infotexts": [f"{text}{seed}{size}" for seed in seeds],
        "prompt_truncated": made.prompt_truncated,
        "timings_ms": timings_ms,
    }
    images = [image.content.decode("ascii") for image in made.images] if body.send_images else []
    return to_json({"images": images, "parameters": parameters, "info": to_json(info).decode()})


def interrupted_json(body: Txt2ImgRequest, parameters: dict[str, Any], model: str) -> bytes:
    """The answer to a request that POST /sdapi/v1/interrupt ended."""
    info = {**_about(body, model), "all_seeds": [], "interrupted": True}
    return to_json({"images": [], "parameters": parameters, "info": to_json(info).decode()})


def _about(body: Txt2ImgRequest, model: str) -> dict[str, Any]:
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
