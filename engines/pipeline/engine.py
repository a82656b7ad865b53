"""The engine: jobs of one batch key through text, denoise and decode to pixels (engines.types.Engine).

A job's picture depends on the job alone: its noise comes from its own seed before batching, and nothing in a batch
looks across jobs. Knows no HTTP, no files and no choice of backend.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.backends.cuda.graphs import GraphCapture, GraphKey, GraphRunner
from engines.device.memory import open_card
from engines.device.timer import Stopwatch
from engines.errors import JobError, OutOfMemoryError
from engines.pipeline.denoise_decode import Decode, Denoise
from engines.pipeline.download import CudaDownloader, Download, Downloader, HostDownloader, jpeg_on_card
from engines.pipeline.embedding_cache import TextEmbedding
from engines.pipeline.latent_cache import LatentCache, resized
from engines.pipeline.results import BatchResults
from engines.pipeline.text_stage import TextStage, join
from engines.sampler import Schedule, angles_for, angles_from_image, job_noise, mix
from engines.types import BatchKey, Deliver, EngineInfo, Job, Limits, Pixels, RawImage

MAX_CONTROL_SCALE = 2


class Kernels(Protocol):
    """Modules made of kernels that have to prove themselves on the card that is there."""

    @property
    def reasons(self) -> Mapping[str, str]: ...

    @property
    def replaced(self) -> Mapping[str, str]: ...

    def compare(self, work: Callable[[], object]) -> None:
        """Runs `work`, in which each kernel is compared with its reference."""


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
    """Captured graphs in place of the plain chains: of denoising, of that with a drawing, and of decoding; and of what
    makes PNG files, which is left to the server where there are no graphs."""

    plain: GraphRunner
    decode: GraphRunner
    png: GraphRunner
    controlled: GraphRunner | None
    recorder: GraphCapture  # what captures them, and the text stage's


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
        kernels: Kernels | None = None,
    ):
        """buckets: the batch sizes that the modules are prepared for and pad to; empty where they run any as it is.
        runners: graphs that `warmup` captures; they pad texts to the longest that the engine takes. kernels: what the
        modules are made of, which `warmup` has compared before it captures."""
        self._modules, self._space, self._schedule = modules, space, schedule
        self._info, self._limits, self._buckets, self._runners = info, limits, buckets, runners
        self._kernels = kernels
        self._card = None
        if space.device.type == "cuda":
            self._card = open_card(str(torch.cuda.get_device_properties(space.device).uuid))
        self._images = LatentCache(lambda pixels: modules.encoder(pixels.to(space.device)))
        self._downloader: Downloader = HostDownloader()
        self._stream = None  # TensorRT wants one that is not the default
        if space.device.type == "cuda":
            torch.cuda.set_device(space.device)
            torch.set_num_threads(1)  # to wake a pool for a batch's noise took longer than the pool saves
            self._downloader = CudaDownloader(jpeg_on_card())
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def limits(self) -> Limits:
        return self._limits

    def warmup(self) -> None:
        if self._kernels is not None:
            self._kernels.compare(self._use_every_kernel)
            self._info.reasons.update(self._kernels.reasons)
            self._info.replaced_kernels.update(self._kernels.replaced)
        with self._on_device():
            self._capture()
        sizes = self._limits.sizes if self._buckets else ()
        drawings = [None] if self._modules.controlled is None else [None, np.zeros((64, 64, 3), np.uint8)]
        for width, height in sizes or (self._limits.default_size,):
            for count in {min(bucket, self._limits.max_batch) for bucket in self._buckets or (1,)}:
                for drawing in drawings:
                    job = Job("", seed=0, width=width, height=height, control_image=drawing)
                    for asked in self._files_of(job):
                        self.generate([asked] * count)
        if self._kernels is not None:
            self._use_every_kernel()

    def _files_of(self, job: Job) -> Sequence[Job]:
        """The job, and once more for each kind of file that the device makes itself."""
        jpeg = () if self._stream is None else (replace(job, jpeg_quality=90),)
        png = () if self._runners is None else (replace(job, png=True),)
        return job, *jpeg, *png

    def _use_every_kernel(self) -> None:
        """One image of a text, and one of an image or of a drawing, as this engine takes them."""
        width, height = self._limits.default_size
        job = Job("a red circle", seed=0, width=width, height=height)
        blank = np.zeros((64, 64, 3), np.uint8)
        for one in (job, replace(job, image=blank), replace(job, control_image=blank)):
            if one.conditioning in self._limits.conditioning:
                self.generate([one])

    @torch.inference_mode()
    def _capture(self) -> None:
        """Captures every graph. Raises OutOfMemoryError."""
        runners = self._runners
        if runners is None:
            return
        try:
            for runner in filter(None, (runners.decode, runners.plain, runners.controlled, runners.png)):
                runner.capture()
            self._modules.text.capture(runners.recorder)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"no memory to capture the CUDA graphs ({error})") from error

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """This engine's card and stream are the current ones."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._space.device), torch.cuda.stream(self._stream):
            yield

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
    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        """See engines.types.Engine.generate."""
        self._check(jobs)
        try:
            with self._on_device():
                return self._generate(jobs, deliver)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(_no_memory(jobs, error)) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # what torch's CPU allocator raises
                raise OutOfMemoryError(_no_memory(jobs, error)) from error
            raise

    def _generate(self, jobs: Sequence[Job], deliver: Deliver | None) -> list[RawImage]:
        watch = Stopwatch(self._space.device)
        embeddings = self._modules.text.encode([job.prompt for job in jobs])
        noise, angles = self._start(jobs)  # drawn while the GPU works on the text
        watch.record()
        inputs = self._read(embeddings)
        guidance = torch.tensor([job.guidance_scale for job in jobs], dtype=torch.float32)
        inputs |= {"noise": noise, "angles": angles, "guidance": guidance * self._space.guidance_embeds_scale}
        inputs |= self._drawn(jobs)
        if self._limits.adapters:
            inputs |= self._adapters(jobs)
        latents, bucket = self._denoise(inputs, jobs[0].steps)
        watch.record()
        made = BatchResults(
            jobs, embeddings, watch, bucket or len(jobs), uncaptured=self._runners is not None and not bucket
        )
        coming: list[Download] = []
        for latent in torch.split(latents, 1):
            pixels, finite = self._decode(latent)
            watch.record()
            # The next picture is decoding before this thread waits for the one before it.
            job = jobs[len(coming)]
            picture = self._png(pixels, latent) if job.png else {"pixels": pixels[0]}
            coming.append(self._downloader.start({**picture, "finite": finite[0]}, job))
            if len(coming) > 1:
                made.take(coming[-2], deliver)
        made.take(coming[-1], deliver)
        return made.images

    def _denoise(self, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, int | None]:
        """Latents [B, C, h, w], and the bucket of the graph that ran, if one did."""
        drawn = "control" in inputs
        batch, _, height, width = inputs["noise"].shape[1:]
        shape = GraphKey(batch, height, width, steps)
        runner = None if self._runners is None else (self._runners.controlled if drawn else self._runners.plain)
        if runner is not None:
            (latent, *_), bucket = runner.run(inputs, shape)
            return latent, bucket
        transformer = self._modules.controlled if drawn else self._modules.transformer
        assert transformer is not None  # else the limits refuse drawings
        there = {name: value.to(self._space.device) for name, value in inputs.items()}
        return Denoise(transformer, self._space.dtype)(there)[0], None

    def _decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """pixels [1, H, W, 3] and finite [1] of one latent [1, C, h, w]."""
        if self._runners is None:
            return Decode(self._modules.decoder)({"latent": latent})
        return self._runners.decode({"latent": latent}, GraphKey(1, latent.shape[2], latent.shape[3], 1))

    def _png(self, pixels: Tensor, latent: Tensor) -> dict[str, Tensor]:
        """The parts of a PNG file of pixels [1, H, W, 3], if they can be made here; else the pixels."""
        if self._runners is None:
            return {"pixels": pixels[0]}
        words, facts = self._runners.png({"pixels": pixels}, GraphKey(1, latent.shape[2], latent.shape[3], 1))
        return {"words": words[0], "facts": facts[0]}

    def _read(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """The chain's inputs of the texts; graphs have one length, that of the longest prompt."""
        if self._runners is None:
            text, mask = join(embeddings)
            text = text.to(self._space.dtype)
            return {"text": text} if mask is None else {"text": text, "text_mask": mask}
        states = [embedding.states for embedding in embeddings]
        shape = (len(states), self._info.max_prompt_tokens)
        text = torch.zeros(*shape, states[0].shape[1], dtype=self._space.dtype, device=self._space.device)
        for row, one in zip(text, states, strict=True):
            row[: one.shape[0]] = one
        lengths = torch.tensor([one.shape[0] for one in states])
        return {"text": text, "text_mask": torch.arange(shape[1]) < lengths[:, None]}

    def _start(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """Samples at the first angle, then the noise of each further step [steps, B, C, h, w]; angles [steps, B]. Both
        on the host, ready to be copied while it goes on; on the device where a sample begins from an image."""
        key, space = jobs[0].key, self._space
        shape = (space.channels, key.height // space.compression, key.width // space.compression)
        noise = torch.stack([job_noise(job.seed, shape, key.steps) for job in jobs], dim=1)
        base = angles_for(key.steps, self._schedule)
        images = [job.image for job in jobs if job.image is not None]
        if not images:
            return noise, torch.tensor(base)[:, None].expand(-1, len(jobs))
        starts = [angles_from_image(job.strength, base) for job in jobs]
        angles, noise = torch.tensor(starts, device=space.device).T, noise.to(space.device)
        noise[0] = mix(self._encoded(images, key), noise[0], angles[0])
        return noise, angles

    def _drawn(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """The chain's inputs of the drawings; none where the jobs have none."""
        drawings = [job.control_image for job in jobs if job.control_image is not None]
        if not drawings:
            return {}
        scale = torch.tensor([job.control_scale for job in jobs], dtype=torch.float32)
        return {"control": self._encoded(drawings, jobs[0].key).to(self._space.dtype), "control_scale": scale}

    def _adapters(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """The chain's inputs of the adapters: as many places as a graph has, or else as the jobs need."""
        places = max(len(job.lora) for job in jobs) if self._runners is None else self._limits.most_adapters
        if not places:
            return {}
        index = torch.zeros(len(jobs), places, dtype=torch.int64)
        scale = torch.zeros(len(jobs), places)
        for row, job in enumerate(jobs):
            for place, (name, strength) in enumerate(job.lora):
                index[row, place], scale[row, place] = self._limits.adapters.index(name), strength
        return {"lora_index": index, "lora_scale": scale}

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


def _no_memory(jobs: Sequence[Job], error: Exception) -> str:
    key = jobs[0].key
    return f"no memory for a batch of {len(jobs)} at {key.width}x{key.height}; try a smaller one ({error})"
