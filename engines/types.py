"""The contract between server and engines: a job goes in, pixels come out.

A *job* is one image to make. Jobs with an equal *batch key* may share a *batch*. A *bucket* is the padded size of a
batch. The *stages* are text, denoise and decode. Imports numpy only, so that the server runs without torch.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engines.errors import JobError

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

Conditioning = Literal["text", "image", "control", "image+control"]
DecoderName = Literal["full", "fast"]  # of a job; what each is: EngineInfo.decoders

MAX_SEED = 2**63 - 1
MAX_ADAPTERS = 4  # of one job
MAX_ADAPTER_SCALE = 4.0  # of either sign


class AdapterOption(NamedTuple):
    """A LoRA of --lora. A number as scale: fused at load. None: each request chooses the scale.

    model: name of the checkpoint it belongs to; empty if there is only one.
    """

    name: str
    path: str
    scale: float | None = None
    model: str = ""

    @classmethod
    def parse(cls, text: str) -> "AdapterOption":
        """Parses NAME=PATH or NAME=PATH:SCALE, with MODEL: before it if there are several. Raises ValueError."""
        qualified, equals, path = text.strip().partition("=")
        model, _, name = qualified.rpartition(":")
        before, colon, number = path.rpartition(":")
        scale = None
        if colon and _NUMBER.fullmatch(number):
            path, scale = before, float(number)
        if not equals or not path or not _ADAPTER.fullmatch(name):
            raise ValueError(f"got {text!r}, NAME=PATH[:SCALE] is needed, the name of letters, digits, '.', '_', '-'")
        if scale is not None and abs(scale) > MAX_ADAPTER_SCALE:
            raise ValueError(f"scale of {name}: got {scale:g}, allowed -{MAX_ADAPTER_SCALE:g} to {MAX_ADAPTER_SCALE:g}")
        return cls(name, path, scale, model)

    def __str__(self) -> str:
        return f"{self.model and f'{self.model}:'}{self.name}={self.path}" + (
            "" if self.scale is None else f":{self.scale:g}"
        )


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BatchKey(NamedTuple):
    """The values that all jobs of a batch share."""

    height: int
    width: int
    steps: int
    conditioning: Conditioning
    model: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make. `image` and `control_image` are RGB of any size; the engine resizes them to width x height."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int = 1
    guidance_scale: float = 4.5
    image: Pixels | None = None
    strength: float = 0.5
    control_image: Pixels | None = None
    control_scale: float = 1.0
    lora: tuple[tuple[str, float], ...] = ()  # (name, scale) of each adapter
    decoder: DecoderName = "full"  # jobs of one batch may differ
    jpeg_quality: int | None = None  # set: the engine may return a JPEG file instead of pixels
    png: bool = False  # the engine may return a PNG file instead of pixels
    model: str = ""  # name of the checkpoint, for an engine that holds several

    @property
    def conditioning(self) -> Conditioning:
        if self.image is not None:
            return "image" if self.control_image is None else "image+control"
        return "text" if self.control_image is None else "control"

    @property
    def key(self) -> BatchKey:
        return BatchKey(self.height, self.width, self.steps, self.conditioning, self.model)


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds that a batch spent in each stage; all its jobs share them."""

    text: float
    denoise: float
    decode: float


@dataclass(frozen=True, slots=True)
class RawImage:
    """The image of one job and the facts of its batch."""

    pixels: Pixels  # [height, width, 3] uint8 RGB; empty with a `file`
    stages: StageSeconds
    bucket: int  # size of the batch that ran, padding included
    prompt_truncated: bool = False
    prompt_cached: bool = False
    uncaptured: bool = False  # the engine runs CUDA graphs and has none for this batch
    file: bytes | None = None  # JPEG or PNG, encoded on the GPU


Deliver = Callable[[int, RawImage], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes, steps and conditioning that an engine can run. Sizes are (width, height) in pixels.

    `sizes` empty allows every size with sides in [min_side, max_side] that `multiple` divides and an area of at most
    max_pixels.
    """

    max_batch: int
    default_size: tuple[int, int]
    steps: tuple[int, ...] = (1, 2, 3, 4)
    sizes: tuple[tuple[int, int], ...] = ()
    multiple: int = 32
    min_side: int = 32
    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    conditioning: frozenset[Conditioning] = frozenset({"text"})
    adapters: tuple[str, ...] = ()  # names for Job.lora; jobs of one batch may choose different ones
    decoders: tuple[DecoderName, ...] = ("full",)

    def allows_size(self, width: int, height: int) -> bool:
        if self.sizes:
            return (width, height) in self.sizes
        sides_fit = all(
            self.min_side <= side <= self.max_side and side % self.multiple == 0 for side in (width, height)
        )
        return sides_fit and width * height <= self.max_pixels

    def nearest_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """Returns the three allowed sizes nearest to width x height (by the sum of side differences)."""
        if self.sizes:
            candidates = set(self.sizes)
        else:
            candidates = {
                (w, h) for w in self._sides_near(width) for h in self._sides_near(height) if self.allows_size(w, h)
            }
            candidates.add(self.default_size)
        distance = {size: abs(size[0] - width) + abs(size[1] - height) for size in candidates}
        return sorted(candidates, key=lambda size: (distance[size], size))[:3]

    def size_for_aspect_ratio(self, width: int, height: int) -> tuple[int, int]:
        """Returns the allowed size nearest to the aspect ratio width : height, about as large as the default size."""
        ratio, area = width / height, self.default_size[0] * self.default_size[1]
        near = (round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio)))
        candidates = set(self.sizes) or {
            (w, h) for w in self._sides_near(near[0]) for h in self._sides_near(near[1]) if self.allows_size(w, h)
        }
        candidates.add(self.default_size)

        def distance(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
            """Weighs an error of the ratio four times as much as one of the area."""
            area_error = abs(math.log(size[0] * size[1] / area))
            return abs(math.log(size[0] / size[1] / ratio)) + area_error / 4, size

        return min(candidates, key=distance)

    def _sides_near(self, side: int) -> set[int]:
        low = side // self.multiple * self.multiple
        largest = self.max_side // self.multiple * self.multiple
        smallest = -(-self.min_side // self.multiple) * self.multiple
        return {min(max(s, smallest), largest) for s in (low - self.multiple, low, low + self.multiple)}

    def check(self, job: Job) -> None:
        """Raises JobError, naming field, value and bounds, for a job outside these limits."""
        if job.conditioning not in self.conditioning:
            field, remedy = "prompt alone" if job.conditioning == "text" else "image", ""
            if job.control_image is not None:
                field = "control_image"
                remedy = "; strokes need a ControlNet: the folder controlnet/ in the checkpoint, or --controlnet"
            runs = ", ".join(sorted(self.conditioning))
            raise JobError(f"{field}: got {job.conditioning}, this engine runs {runs}{remedy}")
        if not self.allows_size(job.width, job.height):
            nearest = ", ".join(f"{w}x{h}" for w, h in self.nearest_sizes(job.width, job.height))
            raise JobError(
                f"width x height: got {job.width}x{job.height}, which this engine cannot run; nearest: {nearest}"
            )
        if job.steps not in self.steps:
            allowed = ", ".join(map(str, self.steps))
            raise JobError(f"num_inference_steps: got {job.steps}, this engine runs {allowed}")
        if not 0 <= job.seed <= MAX_SEED:
            raise JobError(f"seed: got {job.seed}, allowed 0 to {MAX_SEED}")
        if job.decoder not in self.decoders:
            loaded = ", ".join(self.decoders)
            remedy = "give a second one at start, such as --fast-decoder lite"
            raise JobError(f"decoder: got {job.decoder!r}, loaded: {loaded}; {remedy}")
        if job.lora:
            self._check_lora(job.lora)

    @property
    def max_adapters(self) -> int:
        """Largest number of adapters of one job."""
        return min(len(self.adapters), MAX_ADAPTERS)

    def _check_lora(self, lora: Sequence[tuple[str, float]]) -> None:
        names = [name for name, _ in lora]
        for name, scale in lora:
            if name not in self.adapters:
                allowed = ", ".join(self.adapters) or "none; they are given at start, --lora NAME=PATH without a scale"
                raise JobError(f"lora: got {name!r}, allowed: {allowed}")
            if not abs(scale) <= MAX_ADAPTER_SCALE:
                bounds = f"-{MAX_ADAPTER_SCALE:g} to {MAX_ADAPTER_SCALE:g}"
                raise JobError(f"lora: got {scale} for {name!r}, allowed: a number from {bounds}")
        if len(names) > self.max_adapters or len(set(names)) < len(names):
            raise JobError(f"lora: got {', '.join(names)}; at most {self.max_adapters} at once, each once")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Description of a loaded engine. `reasons`: choice -> one sentence.

    `start_s`: phase of the start -> seconds; phases may run in parallel. `replaced_kernels`: kernel of the GPU path,
    CUDA graph or nvJPEG -> reason why PyTorch or the CPU works instead. `decoders`: DecoderName -> value of --decoder
    or --fast-decoder.
    """

    checkpoint: str
    backend: str
    precision: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, object] | None = None
    guidance_trained: tuple[float, float] = (4.0, 5.0)
    max_prompt_tokens: int = 300
    start_s: dict[str, float] = field(default_factory=dict)
    replaced_kernels: dict[str, str] = field(default_factory=dict)
    decoders: dict[str, str] = field(default_factory=lambda: {"full": "full"})


class Engine(Protocol):
    """Turns jobs into images. One thread calls it; every call blocks."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def limits(self) -> Limits: ...

    def warmup(self) -> None:
        """Runs every bucket once, so that no request pays for a first run."""

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        """Returns the images of jobs that share one batch key, in order.

        deliver: called with the index and image of each job as soon as it is done, while later ones run.

        Raises JobError (outside the limits, or keys differ), OutOfMemoryError, OutputError.
        """

    def close(self) -> None: ...


@runtime_checkable
class ReportsMemory(Protocol):
    """An engine on a GPU. Bytes: `used` (by all processes) and `total` of the device, `reserved` by this engine."""

    def memory_bytes(self) -> Mapping[str, int]: ...


def powers_of_two(largest: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... and `largest`, which ends the tuple even if it is no power of two. Raises ValueError."""
    if largest < 1:
        raise ValueError(f"largest bucket: got {largest}, must be at least 1")
    sizes = [1]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if sizes[-1] == largest else (*sizes, largest)


def smallest_fitting(count: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest of the ascending `buckets` that holds `count` jobs. Raises ValueError without one."""
    position = bisect_left(buckets, count)
    if count < 1 or position == len(buckets):
        raise ValueError(f"a batch of {count} fits none of the buckets {', '.join(map(str, buckets))}")
    return buckets[position]
