"""An engine without a model: a colour field from prompt and seed, with delays and faults on demand.

The server, the web page and the load tests run on it. Imports numpy only. `expected_pixels` returns the image of a job,
so that a test can check that a response belongs to its request.
"""

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.errors import JobError, OutOfMemoryError, OutputError
from engines.types import (
    Conditioning,
    Deliver,
    EngineInfo,
    Job,
    Limits,
    Pixels,
    RawImage,
    StageSeconds,
    powers_of_two,
    smallest_fitting,
)

ALL_CONDITIONING: frozenset[Conditioning] = frozenset({"text", "image", "control", "image+control"})

FAKE = "fake"  # name of the checkpoint
CACHED_PROMPTS = 1024
SLOW_S = 0.5
REMEMBERED_BATCHES = 1024

# A prompt that contains a marker triggers its fault for every batch it is in.
RAISE = "[[raise]]"
RAISE_ONCE = "[[once]]"  # raises on the first batch with this prompt, and never again
NAN = "[[nan]]"
BLACK = "[[black]]"  # all pixels are zero
OUT_OF_MEMORY = "[[memory]]"  # for every batch of more than one job
SLOW = "[[slow]]"  # the batch takes SLOW_S longer
HANG = "[[hang]]"
BREAK = "[[break]]"  # this batch and all later ones raise


@dataclass(frozen=True, slots=True)
class FaultInjection:
    """Faults of a fake engine beside those of markers in prompts. Calls count from the first generate after warmup."""

    out_of_memory_above: int | None = None  # jobs of a batch
    raise_on_calls: frozenset[int] = frozenset()
    broken_from_call: int | None = None


class FakeEngine:
    """Implements engines.types.Engine.

    A batch takes `delay_s` plus `delay_per_job_s` for each slot of its bucket, like a device with a fixed cost of a
    launch. A caller may change `delay_s` at any time.
    """

    def __init__(
        self,
        *,
        max_batch: int = 8,
        default_size: tuple[int, int] = (256, 256),
        sizes: tuple[tuple[int, int], ...] = (),
        conditioning: frozenset[Conditioning] = ALL_CONDITIONING,
        delay_s: float = 0.0,
        delay_per_job_s: float = 0.0,
        faults: FaultInjection | None = None,
        adapters: tuple[str, ...] = (),
        fast_decoder: str | None = None,
        checkpoint: str = FAKE,
    ) -> None:
        """fast_decoder: name of a second decoder, of which jobs may ask."""
        self._limits = Limits(
            max_batch=max_batch,
            default_size=default_size,
            sizes=sizes,
            conditioning=conditioning,
            adapters=adapters,
            decoders=("full",) if fast_decoder is None else ("full", "fast"),
        )
        self._info = EngineInfo(
            checkpoint=checkpoint,
            backend="fake",
            precision="uint8",
            device="none",
            versions={"numpy": np.__version__},
            reasons={"backend": "asked for: a colour field from prompt and seed, no model"},
            decoders={"full": "full"} if fast_decoder is None else {"full": "full", "fast": fast_decoder},
        )
        self._buckets = powers_of_two(max_batch)
        self._faults = faults or FaultInjection()
        self._prompts: OrderedDict[str, None] = OrderedDict()
        self._closed = threading.Event()
        self.delay_s = delay_s
        self.delay_per_job_s = delay_per_job_s
        self._calls = 0
        self._raised_once: set[str] = set()
        self._broken = False
        self._batches: deque[int] = deque(maxlen=REMEMBERED_BATCHES)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def batches(self) -> list[int]:
        """Numbers of jobs of the last calls of generate, oldest first."""
        return list(self._batches)

    def warmup(self) -> None:
        """Takes the delay of one batch; there is nothing to compile."""
        time.sleep(self.delay_s)

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        """Returns the colour fields of the jobs, in order, and calls `deliver` for each at the end.

        Raises JobError (no jobs, keys differ, outside the limits) and the injected faults.
        """
        call = self._calls
        self._calls += 1
        self._batches.append(len(jobs))
        self._check(jobs)
        bucket = smallest_fitting(len(jobs), self._buckets)
        began = time.perf_counter()
        self._inject_faults(jobs, call)
        delay = self.delay_s + self.delay_per_job_s * bucket
        if delay > 0:
            self._closed.wait(delay)
        pixels = [_black(job) if BLACK in job.prompt else expected_pixels(job, self._info.checkpoint) for job in jobs]
        spent = time.perf_counter() - began
        stages = StageSeconds(text=spent * 0.1, denoise=spent * 0.3, decode=spent * 0.6)
        images = [
            RawImage(
                pixels=image,
                stages=stages,
                bucket=bucket,
                prompt_truncated=len(job.prompt.split()) > self._info.max_prompt_tokens,
                prompt_cached=self._seen(job.prompt),
            )
            for job, image in zip(jobs, pixels, strict=True)
        ]
        for index, image in enumerate(images):
            if deliver is not None:
                deliver(index, image)
        return images

    def close(self) -> None:
        """Ends a hang or a delay that is under way."""
        self._closed.set()

    def _check(self, jobs: Sequence[Job]) -> None:
        if not 1 <= len(jobs) <= self._limits.max_batch:
            raise JobError(f"jobs: got {len(jobs)}, this engine runs 1 to {self._limits.max_batch} at a time")
        keys = {job.key for job in jobs}
        if len(keys) > 1:
            raise JobError(f"jobs: got {len(keys)} batch keys in one batch, must be one: {sorted(keys)}")
        for job in jobs:
            self._limits.check(job)

    def _inject_faults(self, jobs: Sequence[Job], call: int) -> None:
        faults = self._faults
        prompts = [job.prompt for job in jobs]

        def marked(marker: str) -> bool:
            return any(marker in prompt for prompt in prompts)

        largest = 1 if marked(OUT_OF_MEMORY) else faults.out_of_memory_above
        if largest is not None and len(jobs) > largest:
            raise OutOfMemoryError(f"fake: a batch of {len(jobs)}, memory for {largest}")
        if marked(HANG):
            self._closed.wait()
            raise RuntimeError("fake: closed while hanging")
        if marked(SLOW):
            self._closed.wait(SLOW_S)
        if marked(RAISE):
            raise RuntimeError("fake: a prompt asked for a failure")
        once = {prompt for prompt in prompts if RAISE_ONCE in prompt} - self._raised_once
        if once:
            self._raised_once |= once
            raise RuntimeError("fake: a prompt asked for one failure")
        if call in faults.raise_on_calls:
            raise RuntimeError(f"fake: call {call} was planned to fail")
        self._broken |= marked(BREAK)
        self._broken |= faults.broken_from_call is not None and call >= faults.broken_from_call
        if self._broken:
            raise RuntimeError(f"fake: broken, call {call}")
        if marked(NAN):
            raise OutputError("fake: the decoded image holds NaN")

    def _seen(self, prompt: str) -> bool:
        cached = prompt in self._prompts
        self._prompts[prompt] = None
        self._prompts.move_to_end(prompt)
        if len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return cached


def expected_pixels(job: Job, checkpoint: str = FAKE) -> Pixels:
    """Returns the image [height, width, 3] uint8 that a FakeEngine of this checkpoint makes of this job.

    Checkpoint, prompt, seed, steps, guidance, adapters and decoder choose a colour gradient along each axis. 1 -
    strength blends `image` in; the strokes of `control_image` lie on top, times control_scale.
    """
    text = f"{job.seed}\0{job.steps}\0{job.guidance_scale}\0{job.prompt}"
    text += "".join(f"\0{name}:{scale}" for name, scale in job.lora)
    text += "" if job.decoder == "full" else f"\0decoder:{job.decoder}"
    text += "" if checkpoint == FAKE else f"\0{checkpoint}"
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)
    across = _ramp(digest[0:3], digest[3:6], job.width)
    down = _ramp(digest[6:9], digest[9:12], job.height)
    pixels: Pixels = down[:, None, :] + across[None, :, :]
    if job.image is not None:
        start = _resized(job.image, job.width, job.height).astype(np.float32)
        pixels = (start * (1 - job.strength) + pixels * job.strength).astype(np.uint8)
    if job.control_image is not None:
        strokes = _resized(job.control_image, job.width, job.height) * min(max(job.control_scale, 0.0), 1.0)
        pixels = np.maximum(pixels, strokes.astype(np.uint8))
    return pixels


def _black(job: Job) -> Pixels:
    return np.zeros((job.height, job.width, 3), dtype=np.uint8)


def _ramp(first: NDArray[np.uint8], last: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Returns [length, 3] uint8 from first / 2 to last / 2, so that the sum of two ramps fits into a byte."""
    position = np.linspace(0.0, 1.0, length, dtype=np.float32)[:, None]
    return ((first * (1 - position) + last * position) / 2).astype(np.uint8)


def _resized(image: Pixels, width: int, height: int) -> Pixels:
    """Returns `image` resized to [height, width, 3] by nearest neighbour."""
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    resized: Pixels = image[rows[:, None], columns[None, :]]
    return resized
