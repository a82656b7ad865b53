"""The engine: jobs of one batch key through text, denoise and decode to pixels (engines.types.Engine).

A job's picture depends on the job alone: its noise comes from its own seed before batching, and nothing in a batch
looks across jobs. Knows no HTTP, no files and no choice of backend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cuda.graphs import GraphRunner
from engines.device.memory import open_card
from engines.device.timer import Stopwatch
from engines.errors import JobError, OutOfMemoryError, OutputError
from engines.pipeline.denoise_decode import DenoiseDecode
from engines.pipeline.latent_cache import LatentCache
from engines.pipeline.text_stage import TextStage, join
from engines.sampler import Schedule, angles_for, angles_from_image, job_noise, mix
from engines.types import BatchKey, EngineInfo, Job, Limits, Pixels, RawImage, StageSeconds, smallest_fitting

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


@dataclass(frozen=True)
class GraphRunners:
    """Captured graphs in place of the plain chain, and of the one with a drawing."""

    plain: GraphRunner
    controlled: GraphRunner | None = None


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
        runners: GraphRunners | None = None,
    ):
        """buckets: the batch sizes that the modules are prepared for and pad to; empty where they run any as it is.
        books: graphs that `warmup` captures; they pad texts to the longest that the engine takes."""
        self._modules, self._space, self._schedule = modules, space, schedule
        self._info, self._limits, self._buckets, self._runners = info, limits, buckets, runners
        self._card = None
        if space.device.type == "cuda":
            self._card = open_card(str(torch.cuda.get_device_properties(space.device).uuid))
        self._images = LatentCache(lambda pixels: modules.encoder(pixels.to(space.device)))

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def limits(self) -> Limits:
        return self._limits

    def warmup(self) -> None:
        self._capture()
        sizes = self._limits.sizes if self._buckets else ()
        drawings = [None] if self._modules.controlled is None else [None, np.zeros((64, 64, 3), np.uint8)]
        for width, height in sizes or (self._limits.default_size,):
            for count in {min(bucket, self._limits.max_batch) for bucket in self._buckets or (1,)}:
                for drawing in drawings:
                    self.generate([Job("", seed=0, width=width, height=height, control_image=drawing)] * count)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Captures every graph. Raises OutOfMemoryError."""
        runners = () if self._runners is None else (self._runners.plain, self._runners.controlled)
        try:
            for runner in filter(None, runners):
                runner.capture()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"no memory to capture the CUDA graphs ({error})") from error

    def memory_bytes(self) -> Mapping[str, int]:
        """See engines.types.ReportsMemory; nothing without a GPU."""
        device = self._space.device
        if device.type != "cuda":
            return {}
        if self._card is None:
            free, total = torch.cuda.mem_get_info(device)
            used = {"used": total - free, "total": total}
        else:
            used = dict(self._card.memory_bytes())
        return {"reserved": torch.cuda.memory_reserved(device), **used}

    def close(self) -> None:
        del self._modules, self._images, self._runners
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
        device = self._space.device
        watch = Stopwatch(device)
        embeddings = self._modules.text.encode([job.prompt for job in jobs])
        inputs = self._read(*join(embeddings))
        watch.record()

        guidance = torch.tensor([job.guidance_scale for job in jobs], dtype=torch.float32, device=device)
        noise, angles = self._start(jobs)
        inputs |= {"noise": noise, "angles": angles, "guidance": guidance * self._space.guidance_embeds_scale}
        inputs |= self._drawn(jobs)
        run = self._run(drawn="control" in inputs)
        captured = None
        if isinstance(run, GraphRunner):
            captured = run.graph_for(len(jobs), noise.shape[-2], noise.shape[-1], jobs[0].steps)
        pixels, finite = run(inputs, watch.record)
        watch.record()
        pictures, sound = pixels.cpu().numpy(), finite.tolist()
        if not all(sound):
            bad = [f"seed {job.seed}" for job, fine in zip(jobs, sound, strict=True) if not fine]
            raise OutputError(f"the decoder gave NaN or infinity for {', '.join(bad)} of a batch of {len(jobs)}")
        stages = StageSeconds(*watch.laps())
        bucket = smallest_fitting(len(jobs), self._buckets) if self._buckets else len(jobs)
        if captured is not None:
            bucket = captured.bucket
        uncaptured = isinstance(run, GraphRunner) and captured is None
        return [
            RawImage(picture, stages, bucket, embedding.truncated, embedding.cached, uncaptured)
            for picture, embedding in zip(pictures, embeddings, strict=True)
        ]

    def _read(self, text: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The chain's inputs of the texts [B, T, D]; graphs have one length, that of the longest prompt."""
        text = text.to(self._space.dtype)
        if self._runners is None:
            return {"text": text} if mask is None else {"text": text, "text_mask": mask}
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        missing = self._info.max_prompt_tokens - text.shape[1]
        return {"text": F.pad(text, (0, 0, 0, missing)), "text_mask": F.pad(mask, (0, missing))}

    def _run(self, *, drawn: bool) -> DenoiseDecode | GraphRunner:
        """What denoises and decodes: a book of graphs where there is one."""
        modules = self._modules
        runner = None if self._runners is None else (self._runners.controlled if drawn else self._runners.plain)
        if runner is not None:
            return runner
        transformer = modules.controlled if drawn else modules.transformer
        assert transformer is not None  # else the limits refuse drawings
        return DenoiseDecode(transformer, modules.decoder, self._space.dtype)

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

    def _drawn(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """The chain's inputs of the drawings; none where the jobs have none."""
        drawings = [job.control_image for job in jobs if job.control_image is not None]
        if not drawings:
            return {}
        scale = torch.tensor([job.control_scale for job in jobs], dtype=torch.float32, device=self._space.device)
        return {"control": self._encoded(drawings, jobs[0].key).to(self._space.dtype), "control_scale": scale}

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


def _no_memory(jobs: Sequence[Job], error: Exception) -> str:
    key = jobs[0].key
    return f"no memory for a batch of {len(jobs)} at {key.width}x{key.height}; try a smaller one ({error})"
