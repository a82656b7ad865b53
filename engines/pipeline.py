"""The engine: jobs of one batch key through text, denoise and decode to pixels (engines.types.Engine).

A job's picture depends on the job alone: its noise comes from its own seed before batching, and nothing in a batch
looks across jobs. Knows no HTTP, no files and no choice of backend.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.buckets import smallest_fitting
from engines.control import LatentCache
from engines.errors import JobError, OutOfMemoryError, OutputError
from engines.sampler import Denoiser, Schedule, angles_for, angles_from_image, job_noise, mix, sample
from engines.text_stage import TextStage, join
from engines.types import BatchKey, EngineInfo, Job, Limits, Pixels, RawImage, StageSeconds

MAX_CONTROL_SCALE = 2


@dataclass(frozen=True)
class Modules:
    """What a batch passes through, each executed by its backend."""

    text: TextStage
    transformer: Callable[..., Tensor]  # SprintTransformer.forward
    decoder: Callable[[Tensor], tuple[Tensor, Tensor]]  # PixelDecoder.forward
    encoder: Callable[[Tensor], Tensor]  # PixelEncoder.forward
    controlled: Callable[..., Tensor] | None = None  # ControlledTransformer.forward


@dataclass(frozen=True)
class LatentSpace:
    """Numbers that the modules were built with."""

    channels: int
    compression: int  # pixels per latent cell along a side
    guidance_embeds_scale: float
    dtype: torch.dtype  # of the transformer
    device: torch.device


class SprintEngine:
    """Text in, pixels out, by the modules it is given."""

    def __init__(
        self,
        modules: Modules,
        space: LatentSpace,
        info: EngineInfo,
        limits: Limits,
        schedule: Schedule = "paper",
        buckets: tuple[int, ...] = (),
    ):
        """buckets: the batch sizes that the modules are prepared for and pad to; empty where they run any as it is."""
        self._modules, self._space, self._schedule = modules, space, schedule
        self._info, self._limits, self._buckets = info, limits, buckets
        self._images = LatentCache(lambda pixels: modules.encoder(pixels.to(space.device)))

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def limits(self) -> Limits:
        return self._limits

    def warmup(self) -> None:
        sizes = self._limits.sizes if self._buckets else ()
        drawings = [None] if self._modules.controlled is None else [None, np.zeros((64, 64, 3), np.uint8)]
        for width, height in sizes or (self._limits.default_size,):
            for count in {min(bucket, self._limits.max_batch) for bucket in self._buckets or (1,)}:
                for drawing in drawings:
                    self.generate([Job("", seed=0, width=width, height=height, control_image=drawing)] * count)

    def memory_bytes(self) -> Mapping[str, int]:
        """See engines.types.ReportsMemory; nothing without a GPU."""
        device = self._space.device
        if device.type != "cuda":
            return {}
        _, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"used": used, "reserved": reserved, "total": total}

    def close(self) -> None:
        del self._modules, self._images
        if self._space.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def generate(self, jobs: Sequence[Job]) -> list[RawImage]:
        """See engines.types.Engine.generate."""
        self._check(jobs)
        try:
            return self._generate(jobs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(_no_memory(jobs, error)) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # what torch's CPU allocator raises
                raise OutOfMemoryError(_no_memory(jobs, error)) from error
            raise

    def _generate(self, jobs: Sequence[Job]) -> list[RawImage]:
        device, dtype = self._space.device, self._space.dtype
        watch = Stopwatch(device)
        embeddings = self._modules.text.encode([job.prompt for job in jobs])
        text, mask = join(embeddings)
        text = text.to(dtype)
        watch.lap()

        guidance = torch.tensor([job.guidance_scale for job in jobs], dtype=torch.float32, device=device)
        guidance = guidance * self._space.guidance_embeds_scale

        def plain(x: Tensor, flow_time: Tensor) -> Tensor:
            return self._modules.transformer(x.to(dtype), text, flow_time, guidance, mask)

        velocity = self._controlled(jobs, text, guidance, mask) or plain
        noise, angles = self._start(jobs)
        latent = sample(velocity, noise[0], angles, noise[1:])
        watch.lap()

        pixels, finite = self._modules.decoder(latent)
        watch.lap()
        pictures, sound = pixels.cpu().numpy(), finite.tolist()
        if not all(sound):
            bad = [f"seed {job.seed}" for job, fine in zip(jobs, sound, strict=True) if not fine]
            raise OutputError(f"the decoder gave NaN or infinity for {', '.join(bad)} of a batch of {len(jobs)}")
        stages = StageSeconds(*watch.laps())
        bucket = smallest_fitting(len(jobs), self._buckets) if self._buckets else len(jobs)
        return [
            RawImage(picture, stages, bucket, embedding.truncated, embedding.cached)
            for picture, embedding in zip(pictures, embeddings, strict=True)
        ]

    def _start(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """Samples at the first angle, then the noise of each further step [steps, B, C, h, w]; angles [steps, B]."""
        key, space = jobs[0].key, self._space
        shape = (space.channels, key.height // space.compression, key.width // space.compression)
        noise = torch.stack([job_noise(job.seed, shape, key.steps) for job in jobs], dim=1).to(space.device)
        base = angles_for(key.steps, self._schedule)
        images = [job.image for job in jobs if job.image is not None]
        if not images:
            return noise, torch.tensor(base, device=space.device)[:, None].expand(-1, len(jobs))
        starts = [angles_from_image(job.strength, base) for job in jobs]
        angles = torch.tensor(starts, device=space.device).T
        noise[0] = mix(self._encoded(images, key), noise[0], angles[0])
        return noise, angles

    def _controlled(self, jobs: Sequence[Job], text: Tensor, guidance: Tensor, mask: Tensor | None) -> Denoiser | None:
        """The transformer as the drawings of the jobs steer it; None where there are none."""
        drawings = [job.control_image for job in jobs if job.control_image is not None]
        run, dtype, device = self._modules.controlled, self._space.dtype, self._space.device
        if not drawings or run is None:
            return None
        control = self._encoded(drawings, jobs[0].key).to(dtype)
        scale = torch.tensor([job.control_scale for job in jobs], dtype=torch.float32, device=device)

        def velocity(x: Tensor, flow_time: Tensor) -> Tensor:
            return run(x.to(dtype), text, flow_time, guidance, mask, control, scale)

        return velocity

    def _encoded(self, images: Sequence[Pixels], key: BatchKey) -> Tensor:
        """Latents [B, C, h, w] of RGB images of any size."""
        return self._images.latents(images, lambda image: resized(image, key.width, key.height), key[:2])

    def _check(self, jobs: Sequence[Job]) -> None:
        """Raises JobError for a batch that this engine cannot run."""
        if not 1 <= len(jobs) <= self._limits.max_batch:
            raise JobError(f"batch: got {len(jobs)} jobs, this engine runs 1 to {self._limits.max_batch} at once")
        for job in jobs:
            self._limits.check(job)
            if job.key != jobs[0].key:
                raise JobError(f"batch key: got {job.key} and {jobs[0].key} in one batch; they must agree")
            if not 0 <= job.strength <= 1:
                raise JobError(f"strength: got {job.strength}, allowed 0 to 1")
            if not 0 <= job.control_scale <= MAX_CONTROL_SCALE:
                raise JobError(f"control_scale: got {job.control_scale}, allowed 0 to {MAX_CONTROL_SCALE}")


def resized(image: Pixels, width: int, height: int) -> Tensor:
    """RGB [H, W, 3] of any size stretched to [height, width, 3] uint8, bicubic with antialiasing."""
    if image.shape[:2] == (height, width):
        return torch.tensor(image)
    planes = torch.tensor(image).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)


class Stopwatch:
    """Seconds between laps, as the device spent them. On CUDA by events, so that a lap does not wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.lap()

    def lap(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def laps(self) -> list[float]:
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in zip(self._times, self._times[1:], strict=False)]


def _no_memory(jobs: Sequence[Job], error: Exception) -> str:
    key = jobs[0].key
    return f"no memory for a batch of {len(jobs)} at {key.width}x{key.height}; try a smaller one ({error})"
