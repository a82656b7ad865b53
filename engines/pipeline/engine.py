"""The engine: runs jobs of one batch key through text, denoise and decode (engines.types.Engine).

The image depends on its job alone: the noise comes from the job's own seed, and no computation mixes jobs of a batch.
Knows no HTTP, no files and no choice of backend.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engines.backends.cuda.graphs import GraphKey, GraphRunners
from engines.device.memory import open_card
from engines.device.phases import Phases
from engines.device.threads import compute_threads
from engines.device.timer import Stopwatch
from engines.errors import JobError, OutOfMemoryError
from engines.pipeline.denoise_decode import Decode, Denoise
from engines.pipeline.download import CudaDownloader, Download, Downloader, HostDownloader, jpeg_on_card
from engines.pipeline.latent_cache import LatentCache, resized
from engines.pipeline.limits import LatentSpace
from engines.pipeline.results import BatchResults
from engines.pipeline.text_stage import TextEmbedding, TextStage, join, pad
from engines.sampler import Schedule, angles_for, angles_from_image, job_noise, mix
from engines.types import BatchKey, DecoderName, Deliver, EngineInfo, Job, Limits, Pixels, RawImage

MAX_CONTROL_SCALE = 2

logger = logging.getLogger("engines.pipeline")


class Kernels(Protocol):
    """Kernels that the engine compares with their references on the GPU at hand."""

    @property
    def reasons(self) -> Mapping[str, str]: ...

    @property
    def replaced(self) -> Mapping[str, str]: ...

    def compare(self, work: Callable[[], object]) -> None:
        """Runs `work` and compares each kernel in it with its reference."""


@dataclass(frozen=True)
class Modules:
    """The modules of an engine, each run by its backend."""

    text: TextStage
    transformer: Callable[..., Tensor]  # SprintTransformer.forward
    decoder: Callable[[Tensor], tuple[Tensor, Tensor]]  # PixelDecoder.forward
    encoder: Callable[[Tensor], Tensor]  # PixelEncoder.forward
    controlled: Callable[..., Tensor] | None = None  # ControlledTransformer.forward
    fast_decoder: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # as `decoder`


class SprintEngine:
    """Implements engines.types.Engine with the given modules."""

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
        threads: int | None = None,
    ):
        """buckets: batch sizes to which the modules pad; empty if they run any size.

        runners: graphs that `warmup` captures; they pad texts to the longest allowed one. kernels: those of the
        modules; `warmup` compares them with their references before it captures. threads: compute threads of each call
        on a CPU; None leaves torch's.
        """
        self._modules, self._space, self._schedule = modules, space, schedule
        self._info, self._limits, self._buckets, self._runners = info, limits, buckets, runners
        self._kernels, self._threads = kernels, threads
        self._card = None
        self._images = LatentCache(lambda pixels: modules.encoder(pixels.to(space.device)))
        self._downloader: Downloader = HostDownloader()
        self._stream = None  # TensorRT needs another one than the default
        if space.device.type == "cuda":
            self._card = open_card(str(torch.cuda.get_device_properties(space.device).uuid))
            torch.cuda.set_device(space.device)
            torch.set_num_threads(1)  # the start of a thread pool costs more than it saves on a batch's noise
            self._downloader = CudaDownloader(jpeg_on_card())
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def limits(self) -> Limits:
        return self._limits

    def warmup(self) -> None:
        phases = Phases(self._info.start_s)
        if self._kernels is not None:
            phases.timed("comparison", partial(self._kernels.compare, self._run_every_kernel))
            self._info.reasons.update(self._kernels.reasons)
            self._info.replaced_kernels.update(self._kernels.replaced)
        if self._runners is not None or self._stream is not None:
            phases.timed("graphs", self._capture)
        phases.timed("first images", self._make_first_images)

    def _make_first_images(self) -> None:
        drawings = [None] if self._modules.controlled is None else [None, np.zeros((64, 64, 3), np.uint8)]
        counts = sorted({min(bucket, self._limits.max_batch) for bucket in self._buckets or (1,)})
        for size, drawing in product(self._warm_sizes(), drawings):
            for index, variant in enumerate(self._variants(Job("", 0, *size, control_image=drawing))):
                for count in counts[: 1 if index else None]:
                    self.generate([variant] * count)
        if self._kernels is not None:
            self._make_each_kind()

    def _warm_sizes(self) -> Sequence[tuple[int, int]]:
        """Returns all sizes for graphs and engines; for eager modules, which hold nothing by size, a small one."""
        if self._buckets:
            return self._limits.sizes or (self._limits.default_size,)
        small = (max(side // 8, self._limits.min_side) for side in self._limits.default_size)
        return (min(self._limits.nearest_sizes(*small), key=math.prod),)

    def _variants(self, job: Job) -> Sequence[Job]:
        """Returns a copy of the job for each decoder, and for each file format that the device encodes."""
        jpeg = () if self._stream is None else (replace(job, jpeg_quality=90),)
        png = () if self._runners is None else (replace(job, png=True),)
        return *(replace(job, decoder=name) for name in self._limits.decoders), *jpeg, *png

    def _run_every_kernel(self) -> None:
        """Launches each tile of each kernel that a graph holds, also those of the largest batch and of long texts."""
        self._make_each_kind()
        for size in self._warm_sizes():
            self.generate([Job("a red circle", 0, *size)] * self._limits.max_batch)
        with self._on_device():
            self._modules.text.run_all_lengths()

    def _make_each_kind(self) -> None:
        """Makes one image from text, and one from each kind of image that this engine takes."""
        job = Job("a red circle", 0, *self._limits.default_size)
        blank = np.zeros((64, 64, 3), np.uint8)
        for variant in (job, replace(job, image=blank), replace(job, control_image=blank)):
            if variant.conditioning in self._limits.conditioning:
                self.generate([variant])
        for decoder in self._limits.decoders[1:]:
            self.generate([replace(job, decoder=decoder)])

    @torch.inference_mode()
    def _capture(self) -> None:
        """Captures every graph and tries nvJPEG; names what does not work. Raises OutOfMemoryError."""
        with self._on_device():
            failed = {} if self._runners is None else self._captured(self._runners)
            if (reason := self._downloader.try_jpeg()) is not None:
                failed["nvJPEG"] = reason
        for name, reason in failed.items():
            if name not in self._info.replaced_kernels:
                logger.warning("%s: %s; images are right, and slower", name, reason)
        self._info.replaced_kernels.update(failed)

    def _captured(self, runners: GraphRunners) -> dict[str, str]:
        """Captures every graph. Returns name -> reason of those that cannot be captured."""
        try:
            failed = runners.capture()
            reason = self._modules.text.capture(runners.recorder)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"no memory to capture the CUDA graphs ({error})") from error
        failed |= {} if reason is None else {"text": reason}
        if failed:
            told, _, _ = self._info.reasons["graphs"].partition(";")
            self._info.reasons["graphs"] = f"{told}; without a graph: {', '.join(failed)}"
        return {f"graph of {name}": reason for name, reason in failed.items()}

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Makes this engine's GPU and stream, or its number of threads, current within the block."""
        if self._stream is None:
            with compute_threads(self._threads):
                yield
            return
        with torch.cuda.device(self._space.device), torch.cuda.stream(self._stream):
            yield

    def memory_bytes(self) -> Mapping[str, int]:
        """See engines.types.ReportsMemory; empty without a GPU."""
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
            if "can't allocate memory" in str(error):  # of torch's CPU allocator
                raise OutOfMemoryError(_no_memory(jobs, error)) from error
            raise

    def _generate(self, jobs: Sequence[Job], deliver: Deliver | None) -> list[RawImage]:
        watch = Stopwatch(self._space.device)
        embeddings = self._modules.text.encode([job.prompt for job in jobs])
        noise, angles = self._noise_and_angles(jobs)  # on the CPU, while the GPU encodes the text
        watch.record()
        inputs = self._text_inputs(embeddings)
        guidance = torch.tensor([job.guidance_scale for job in jobs], dtype=torch.float32)
        inputs |= {"noise": noise, "angles": angles, "guidance": guidance * self._space.guidance_embeds_scale}
        inputs |= self._control_inputs(jobs)
        if self._limits.adapters:
            inputs |= self._adapter_inputs(jobs)
        latents, bucket = self._denoise(inputs, jobs[0].steps)
        watch.record()
        results = BatchResults(
            jobs, embeddings, watch, bucket or len(jobs), uncaptured=self._runners is not None and not bucket
        )
        downloads: list[Download] = []
        for job, latent in zip(jobs, torch.split(latents, 1), strict=True):
            pixels, finite = self._decode(latent, job.decoder)
            watch.record()
            # The thread waits for an image when the next one is decoding.
            output = self._png(pixels, latent) if job.png else {"pixels": pixels[0]}
            downloads.append(self._downloader.start({**output, "finite": finite[0]}, job))
            if len(downloads) > 1:
                results.collect(downloads[-2], deliver)
        results.collect(downloads[-1], deliver)
        return results.images

    def _denoise(self, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, int | None]:
        """Returns latents [B, C, h, w], and the bucket of the graph that ran, if one did."""
        controlled = "control" in inputs
        batch, _, height, width = inputs["noise"].shape[1:]
        shape = GraphKey(batch, height, width, steps)
        runner = None if self._runners is None else (self._runners.controlled if controlled else self._runners.plain)
        if runner is not None:
            (latent, *_), bucket = runner.run(inputs, shape)
            return latent, bucket
        transformer = self._modules.controlled if controlled else self._modules.transformer
        assert transformer is not None  # the limits refuse drawings otherwise
        on_device = {name: value.to(self._space.device) for name, value in inputs.items()}
        return Denoise(transformer, self._space.dtype)(on_device)[0], None

    def _decode(self, latent: Tensor, name: DecoderName) -> tuple[Tensor, ...]:
        """Returns pixels [1, H, W, 3] and finite [1] of one latent [1, C, h, w]."""
        if self._runners is None:
            decoder = self._modules.decoder if name == "full" else self._modules.fast_decoder
            assert decoder is not None  # the limits refuse the job otherwise
            return Decode(decoder)({"latent": latent})
        runner = self._runners.decode if name == "full" else self._runners.fast_decode
        assert runner is not None
        return runner({"latent": latent}, GraphKey(1, latent.shape[2], latent.shape[3], 1))

    def _png(self, pixels: Tensor, latent: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a PNG file of pixels [1, H, W, 3]; without its graph the pixels."""
        if self._runners is None or self._runners.png.failure is not None:
            return {"pixels": pixels[0]}
        words, facts = self._runners.png({"pixels": pixels}, GraphKey(1, latent.shape[2], latent.shape[3], 1))
        return {"words": words[0], "facts": facts[0]}

    def _text_inputs(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        """Returns the text inputs of Denoise; for graphs padded to the longest allowed prompt."""
        if self._runners is None:
            text, mask = join(embeddings)
            text = text.to(self._space.dtype)
            return {"text": text} if mask is None else {"text": text, "text_mask": mask}
        text, mask = pad(embeddings, self._info.max_prompt_tokens, self._space.dtype)
        return {"text": text, "text_mask": mask}

    def _noise_and_angles(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """Returns noise [steps, B, C, h, w], the sample at the first angle first, and angles [steps, B].

        Both are on the host; on the device if the jobs start from images.
        """
        key, space = jobs[0].key, self._space
        shape = (space.channels, key.height // space.compression, key.width // space.compression)
        noise = torch.stack([job_noise(job.seed, shape, key.steps) for job in jobs], dim=1)
        base = angles_for(key.steps, self._schedule, space.one_step_angle)
        images = [job.image for job in jobs if job.image is not None]
        if not images:
            return noise, torch.tensor(base)[:, None].expand(-1, len(jobs))
        starts = [angles_from_image(job.strength, base) for job in jobs]
        angles, noise = torch.tensor(starts, device=space.device).T, noise.to(space.device)
        noise[0] = mix(self._image_latents(images, key), noise[0], angles[0])
        return noise, angles

    def _control_inputs(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """Returns the inputs of Denoise for drawings; empty without any."""
        drawings = [job.control_image for job in jobs if job.control_image is not None]
        if not drawings:
            return {}
        scale = torch.tensor([job.control_scale for job in jobs], dtype=torch.float32)
        return {"control": self._image_latents(drawings, jobs[0].key).to(self._space.dtype), "control_scale": scale}

    def _adapter_inputs(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """Returns the inputs of Denoise for adapters, with as many slots as graphs have or the jobs need."""
        slots = max(len(job.lora) for job in jobs) if self._runners is None else self._limits.max_adapters
        if not slots:
            return {}
        index = torch.zeros(len(jobs), slots, dtype=torch.int64)
        scale = torch.zeros(len(jobs), slots)
        for row, job in enumerate(jobs):
            for slot, (name, strength) in enumerate(job.lora):
                index[row, slot], scale[row, slot] = self._limits.adapters.index(name), strength
        return {"lora_index": index, "lora_scale": scale}

    def _image_latents(self, images: Sequence[Pixels], key: BatchKey) -> Tensor:
        """Returns the latents [B, C, h, w] of RGB images of any size."""
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
