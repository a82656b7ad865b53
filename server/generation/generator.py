"""From an order to encoded pictures: slots, then decoding, then the engine, then encoding.

Shared by POST /generate, the OpenAI routes and whatever else asks for pictures. Knows no HTTP.
"""

import asyncio
import secrets
import time
from dataclasses import dataclass, replace

import numpy as np

from engines.errors import JobError
from engines.types import MAX_SEED, Job, Limits, Pixels
from server.errors import FieldError, InvalidError
from server.generation.image_codec import Codec, ImageFormat, encoder, measured
from server.generation.safety.guard import Safety
from server.generation.scheduler import Scheduler
from server.telemetry.timings import Timings

WHITE, BLACK = 255, 0  # what shows through transparent parts of an image, and of strokes on black

RANDOM_SEEDS = 2**32  # a random seed survives the double precision of a JavaScript client


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What one request asks for. Images are files: bytes, or text in base64. None: the engine's or server's default."""

    prompt: str
    count: int = 1
    steps: int = 1
    guidance_scale: float = 4.5
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    output_format: ImageFormat = "png"
    output_quality: int = 90
    image: bytes | str | None = None
    strength: float = 0.5
    control_image: bytes | str | None = None
    control_scale: float = 1.0
    lora: tuple[tuple[str, float], ...] = ()  # adapters by name, each with its scale
    timeout_ms: int | None = None
    base64: bool = False
    keeps_shape: bool = False  # without width and height: the shape of `image`, about as large as the engine's default


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One encoded image: a file, or its base64 where the order asked for that."""

    content: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    pictures: list[EncodedImage]
    width: int
    height: int
    output_format: ImageFormat
    timings_ms: Timings
    prompt_truncated: bool


class Generator:
    """Makes what orders ask for."""

    def __init__(self, scheduler: Scheduler, codec: Codec, safety: Safety, *, timeout_ms: int) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._safety = safety
        self._timeout_ms = timeout_ms

    async def generate(self, order: GenerationRequest, arrived: float) -> GenerationResult:
        """All pictures of an order, or a RequestError. `arrived` (time.monotonic()) starts its deadline.

        Cancelling drops what has not begun.
        """
        limits = self._scheduler.engine.limits
        if order.keeps_shape and order.image is not None and order.width is None and order.height is None:
            content, shape = await self._codec.run(measured, "image", order.image)
            width, height = limits.size_of_shape(*shape)
            order = replace(order, image=content, width=width, height=height)
        template = first_job(order, limits)
        timeout_ms = self._timeout_ms if order.timeout_ms is None else order.timeout_ms
        with self._scheduler.reserve(order.count, arrived + timeout_ms / 1000) as slots:
            prompt_s = 0.0
            if self._safety.checks_prompts:
                prompt_s = await self._codec.run(self._safety.check_prompt, order.prompt)
            if order.image is not None:
                image = await self._codec.decode("image", order.image, WHITE)
                template = replace(template, image=image)
            if order.control_image is not None:
                strokes = await self._codec.decode("control_image", order.control_image, BLACK)
                template = replace(template, control_image=strokes)
            order = replace(order, image=None, control_image=None)  # lets go of files that are decoded now
            jobs = [replace(template, seed=template.seed + i) for i in range(order.count)]
            image_s: list[float] = []
            encode = self._safety.guarded(
                encoder(order.output_format, order.output_quality, base64=order.base64), image_s
            )
            made = await asyncio.gather(*slots.submit(jobs, encode))
        finished = [one.finished for one in made]
        stages = [one.image.stages for one in finished]
        return GenerationResult(
            pictures=[EncodedImage(one.content, job.seed) for job, one in zip(jobs, made, strict=True)],
            width=template.width,
            height=template.height,
            output_format=order.output_format,
            timings_ms=Timings(
                queue=1000 * max(one.queue_s for one in finished),
                text=1000 * max(stage.text for stage in stages),
                denoise=1000 * max(stage.denoise for stage in stages),
                decode=1000 * max(stage.decode for stage in stages),
                encode=1000 * max(one.encode_s for one in made),
                total=1000 * (time.monotonic() - arrived),
                safety=1000 * (prompt_s + max(image_s, default=0.0)) if self._safety.is_on else None,
            ),
            prompt_truncated=any(one.image.prompt_truncated for one in finished),
        )


def first_job(order: GenerationRequest, limits: Limits) -> Job:
    """The first job of the order, checked against the engine's limits, still without images. Raises InvalidError."""
    seed = secrets.randbelow(RANDOM_SEEDS) if order.seed is None else order.seed
    last = MAX_SEED - order.count + 1
    if seed > last:
        raise InvalidError(
            [
                FieldError(
                    "seed",
                    f"seed: got {seed} for {order.count} images, allowed: 0 to {last}, since image i uses seed + i",
                )
            ]
        )
    default_width, default_height = limits.default_size
    job = Job(
        prompt=order.prompt,
        seed=seed,
        width=default_width if order.width is None else order.width,
        height=default_height if order.height is None else order.height,
        steps=order.steps,
        guidance_scale=order.guidance_scale,
        strength=order.strength,
        control_scale=order.control_scale,
        lora=order.lora,
        jpeg_quality=order.output_quality if order.output_format == "jpeg" else None,
        png=order.output_format == "png",
    )
    stand_in: Pixels = np.zeros((1, 1, 3), dtype=np.uint8)
    conditioned = replace(
        job,
        image=None if order.image is None else stand_in,
        control_image=None if order.control_image is None else stand_in,
    )
    if conditioned.conditioning not in limits.conditioning:
        field = "prompt alone" if conditioned.conditioning == "text" else "image"
        remedy = ""
        if order.control_image is not None:
            field = "control_image"
            remedy = "; strokes need a ControlNet: the folder controlnet/ in the checkpoint, or --controlnet"
        runs = ", ".join(sorted(limits.conditioning))
        raise InvalidError(
            [FieldError(field, f"{field}: got {conditioned.conditioning}, this engine runs {runs}{remedy}")]
        )
    try:
        limits.check(conditioned)
    except JobError as error:
        raise InvalidError.from_job_error(error) from error
    return job
