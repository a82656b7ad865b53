"""From a request to encoded images: reserves slots, decodes input images, runs the engine, encodes.

Every route and live session generates through this file. It knows no HTTP.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.errors import JobError
from engines.types import MAX_SEED, DecoderName, Engine, Job, Limits, Pixels, RawImage
from server.errors import FieldError, InvalidError
from server.generation.aspect_ratios import sizes_by_ratio
from server.generation.delivery import EncodedResult
from server.generation.image_codec import Codec, ImageFormat, encoder, read_size
from server.generation.model_engines import chosen_model
from server.generation.safety.guard import Safety
from server.generation.scheduler import Scheduler
from server.telemetry.timings import Timings

WHITE, BLACK = 255, 0  # behind transparent parts of an image, and behind white strokes on black

RANDOM_SEEDS = 2**32  # a random seed survives the double precision of a JavaScript client

Decode = Callable[[str, bytes | str, int], Awaitable[Pixels]]  # field, file or base64, background


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, under the API's field names. Images are files: bytes or base64 text. None: the default."""

    prompt: str
    model: str | None = None  # a name of server.generation.model_engines
    num_images: int = 1
    num_inference_steps: int = 1
    guidance_scale: float = 4.5
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    aspect_ratio: str | None = None  # a name of server.generation.aspect_ratios, instead of width and height
    output_format: ImageFormat = "png"
    output_quality: int = 90
    image: bytes | str | None = None
    strength: float = 0.5
    control_image: bytes | str | None = None
    control_scale: float = 1.0
    lora: tuple[tuple[str, float], ...] = ()  # adapter names and scales
    decoder: DecoderName = "full"
    timeout_ms: int | None = None
    base64: bool = False
    keeps_shape: bool = False  # without width and height: the shape of `image`, about as large as the default size


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image file, or its base64 if the request asks for that."""

    content: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    images: list[EncodedImage]
    model: str
    width: int
    height: int
    output_format: ImageFormat
    timings_ms: Timings
    prompt_truncated: bool


class Generator:
    """Generates the images of requests."""

    def __init__(self, scheduler: Scheduler, codec: Codec, safety: Safety, *, timeout_ms: int) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._safety = safety
        self._timeout_ms = timeout_ms

    async def generate(self, request: GenerationRequest, arrived: float) -> GenerationResult:
        """Returns all images of a request, or raises RequestError. Its deadline counts from `arrived`.

        `arrived` is a time.monotonic(). Cancellation drops jobs that have not begun.
        """
        engine = self._scheduler.engine
        _, chosen = chosen_model(engine, request.model)
        sized = (request.width, request.height, request.aspect_ratio) != (None, None, None)
        if request.keeps_shape and request.image is not None and not sized:
            content, shape = await self._codec.run(read_size, "image", request.image)
            width, height = chosen.limits.size_for_aspect_ratio(*shape)
            request = replace(request, image=content, width=width, height=height)
        job = first_job(request, engine)
        timeout_ms = self._timeout_ms if request.timeout_ms is None else request.timeout_ms
        image_s: list[float] = []
        with self._scheduler.reserve(request.num_images, arrived + timeout_ms / 1000) as slots:
            prompt_s = await self.check_prompt(request.prompt)
            if request.image is not None or request.control_image is not None:
                job = await self.with_images(job, request, self.decode)
                request = replace(request, image=None, control_image=None)  # frees the decoded files
            jobs = [job, *(replace(job, seed=job.seed + i) for i in range(1, request.num_images))]
            futures = slots.submit(jobs, self.encoder(request, image_s))
            # gather takes one more turn of the event loop
            results = [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)
        safety_s = prompt_s + max(image_s, default=0.0) if self._safety.is_on else None
        return GenerationResult(
            images=[EncodedImage(result.content, job.seed) for job, result in zip(jobs, results, strict=True)],
            model=chosen.info.checkpoint,
            width=job.width,
            height=job.height,
            output_format=request.output_format,
            timings_ms=timings_of(results, arrived, safety_s),
            prompt_truncated=any(result.image.prompt_truncated for result in results),
        )

    async def check_prompt(self, prompt: str) -> float:
        """Returns the seconds that the check took. Raises ContentPolicyError (422) or SafetyError (503)."""
        return await self._codec.run(self._safety.check_prompt, prompt) if self._safety.checks_prompts else 0.0

    async def decode(self, field: str, source: bytes | str, background: int) -> Pixels:
        """Decodes an input image on a codec thread. Raises InvalidError (422) that names `field`."""
        return await self._codec.decode(field, source, background)

    async def with_images(self, job: Job, request: GenerationRequest, decode: Decode) -> Job:
        """Returns the job with the decoded input images of its request. Raises as `decode`."""
        if request.image is not None:
            job = replace(job, image=await decode("image", request.image, WHITE))
        if request.control_image is not None:
            job = replace(job, control_image=await decode("control_image", request.control_image, BLACK))
        return job

    def encoder(self, request: GenerationRequest, check_s: list[float]) -> Callable[[RawImage], bytes]:
        """Returns the request's encoder, which checks each image first and appends the check's seconds to `check_s`."""
        encode = encoder(request.output_format, request.output_quality, base64=request.base64)
        return self._safety.checked_encoder(encode, check_s)


def timings_of(results: Sequence[EncodedResult], since: float, safety_s: float | None = None) -> Timings:
    """Returns milliseconds by stage, of the slowest result in each; `total` counts from `since` (time.monotonic())."""
    stages = [result.image.stages for result in results]
    return Timings(
        queue=1000 * max(result.queue_s for result in results),
        text=1000 * max(stage.text for stage in stages),
        denoise=1000 * max(stage.denoise for stage in stages),
        decode=1000 * max(stage.decode for stage in stages),
        encode=1000 * max(result.encode_s for result in results),
        total=1000 * (time.monotonic() - since),
        safety=None if safety_s is None else 1000 * safety_s,
    )


def first_job(request: GenerationRequest, engine: Engine) -> Job:
    """Returns the request's first job without images, checked against its model's limits. Raises InvalidError (422)."""
    model, chosen = chosen_model(engine, request.model)
    limits = chosen.limits
    seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
    last = MAX_SEED - request.num_images + 1
    if seed > last:
        got = f"seed: got {seed} for {request.num_images} images"
        raise InvalidError([FieldError("seed", f"{got}, allowed: 0 to {last}, since image i uses seed + i")])
    width, height = _size(request, limits)
    job = Job(
        prompt=request.prompt,
        seed=seed,
        width=width,
        height=height,
        steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        control_scale=request.control_scale,
        lora=request.lora,
        decoder=request.decoder,
        jpeg_quality=request.output_quality if request.output_format == "jpeg" else None,
        png=request.output_format == "png",
        model=model,
    )
    checked = job
    if request.image is not None or request.control_image is not None:
        stand_in: Pixels = np.zeros((1, 1, 3), dtype=np.uint8)
        image = None if request.image is None else stand_in
        control_image = None if request.control_image is None else stand_in
        checked = replace(job, image=image, control_image=control_image)
    try:
        limits.check(checked)
    except JobError as error:
        raise InvalidError.from_job_error(error) from error
    return job


def _size(request: GenerationRequest, limits: Limits) -> tuple[int, int]:
    """Returns (width, height) in pixels. Raises InvalidError (422) for an aspect ratio that the engine cannot run."""
    default_width, default_height = limits.default_size
    width = default_width if request.width is None else request.width
    height = default_height if request.height is None else request.height
    if request.aspect_ratio is None:
        return width, height
    got = f"aspect_ratio: got {json.dumps(request.aspect_ratio)}"
    if (request.width, request.height) != (None, None):
        raise InvalidError([FieldError("aspect_ratio", f"{got} and {width}x{height}, allowed: one of the two")])
    sizes = sizes_by_ratio(limits)
    if request.aspect_ratio not in sizes:
        allowed = ", ".join(sizes) or "none; give width and height"
        raise InvalidError([FieldError("aspect_ratio", f"{got}, this engine runs {allowed}")])
    return sizes[request.aspect_ratio]
