"""One CUDA graph per (bucket, height, width, steps): all steps, or decode and conversion to uint8, as one launch.

GraphRunner chooses bucket, padding, order and buffers and counts uncaptured shapes, without CUDA. CudaGraphCapture
makes the CUDA calls and decides nothing. Rules, from PyTorch's notes on CUDA graphs and NVIDIA's guide:

- Capture the largest shape first, into one memory pool, so that smaller graphs fit into its blocks.
- Inputs have static addresses.
- Warm up on a side stream before each capture.
- Graphs of one pool never run at the same time.
- Copy results before the next replay.

All graphs are captured before the engine is ready. No request captures: it runs an uncaptured shape eagerly and counts
it. So does a stage whose graph cannot be captured. A graph owns the computation that it captured, because it reads that
computation's execution contexts and buffers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from engines.errors import CaptureError, in_one_line
from engines.types import smallest_fitting

WARM_UPS = 1  # loads the kernels and allocates the libraries' workspaces; a second run finds both

K = TypeVar("K")
V = TypeVar("V")


class GraphKey(NamedTuple):
    """Shape of a captured graph; height and width are the latent's."""

    bucket: int
    height: int
    width: int
    steps: int


@dataclass(frozen=True)
class InputSpec:
    """One input of a computation: its type, its shape for a key, and its batch dimension."""

    dtype: torch.dtype
    shape: Callable[[GraphKey], tuple[int, ...]]
    batch_dim: int = 0


Inputs = Mapping[str, Tensor]
Replay = Callable[[], None]


class Capturable(Protocol):
    """A computation to capture, such as engines.pipeline.denoise_decode.Denoise; outputs have the batch first."""

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]: ...


class GraphCapture(Protocol):
    """Captures on a device. `record` runs `launch` and returns a replay on the same memory, with the outputs."""

    def warm(self, launch: Callable[[], object]) -> None: ...

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """Raises CaptureError, after which launches and other captures go on."""


def capture_missing(order: Iterable[K], capture: Callable[[K], V], captured: dict[K, V]) -> str | None:
    """Captures what `captured` lacks, in order. Ends at the first that fails, and returns the reason."""
    for key in order:
        if key not in captured:
            try:
                captured[key] = capture(key)
            except CaptureError as error:
                return str(error)
    return None


@dataclass(frozen=True)
class _Captured:
    inputs: Inputs  # views of the shared buffers
    outputs: tuple[Tensor, ...]
    replay: Replay
    computation: Capturable  # held, because the graph reads its memory


class GraphRunner:
    """Runs a computation through its captured graphs.

    make_computation: called once per graph and once for uncaptured shapes, so that each can hold its own execution
    context. inputs: every input of the computation by name.
    """

    def __init__(
        self,
        make_computation: Callable[[], Capturable],
        inputs: Mapping[str, InputSpec],
        buckets: Sequence[int],
        latent_sizes: Iterable[tuple[int, int]],
        steps: Iterable[int],
        recorder: GraphCapture,
        device: torch.device,
    ):
        self._make_computation, self._specs, self._recorder, self._device = make_computation, inputs, recorder, device
        self._eager = make_computation()
        self._buckets = tuple(sorted(buckets))
        keys = {GraphKey(b, *size, s) for b in self._buckets for size in latent_sizes for s in steps}
        self.capture_order = tuple(
            sorted(keys, key=lambda key: (key.bucket * key.height * key.width, key.steps), reverse=True)
        )
        self._buffers = {
            name: torch.zeros(max((prod(spec.shape(key)) for key in keys), default=0), dtype=spec.dtype, device=device)
            for name, spec in inputs.items()
        }
        self._captured: dict[GraphKey, _Captured] = {}
        self.uncaptured: Counter[GraphKey] = Counter()  # runs by uncaptured shape
        self.failure: str | None = None  # why a graph could not be captured

    @property
    def ready(self) -> bool:
        return len(self._captured) == len(self.capture_order)

    def capture(self) -> str | None:
        """Captures every missing graph, largest first, until one fails. Returns the reason, also as `failure`."""
        if self.failure is None:
            self.failure = capture_missing(self.capture_order, self._capture, self._captured)
        self.uncaptured.clear()
        return self.failure

    def __call__(self, inputs: Inputs, shape: GraphKey) -> tuple[Tensor, ...]:
        """Returns the outputs, copied, for `inputs` of this shape (`bucket` is their batch)."""
        return self.run(inputs, shape)[0]

    def run(self, inputs: Inputs, shape: GraphKey) -> tuple[tuple[Tensor, ...], int | None]:
        """Returns the outputs and the bucket of the graph that made them; None if it ran eagerly."""
        bucket = smallest_fitting(shape.bucket, self._buckets) if shape.bucket <= self._buckets[-1] else None
        captured = None if bucket is None else self._captured.get(shape._replace(bucket=bucket))
        if captured is None:
            self.uncaptured[shape] += 1
            return self._eager({name: value.to(self._device) for name, value in inputs.items()}), None
        return self._replay(captured, inputs, shape.bucket), bucket

    def _capture(self, key: GraphKey) -> _Captured:
        views = {
            name: self._buffers[name][: prod(spec.shape(key))].view(spec.shape(key))
            for name, spec in self._specs.items()
        }
        computation = self._make_computation()
        for _ in range(WARM_UPS):
            self._recorder.warm(lambda: computation(views))
        replay, outputs = self._recorder.record(lambda: computation(views))
        return _Captured(views, outputs, replay, computation)

    def _replay(self, captured: _Captured, inputs: Inputs, batch: int) -> tuple[Tensor, ...]:
        for name, view in captured.inputs.items():
            dim = self._specs[name].batch_dim
            view.narrow(dim, 0, batch).copy_(_pinned_for_copy(inputs[name], view), non_blocking=True)
            # Pad with the last job: rows are independent, and stale buffer contents may be NaN.
            missing = view.shape[dim] - batch
            if missing:
                last = view.narrow(dim, batch - 1, 1)
                view.narrow(dim, batch, missing).copy_(last.expand_as(view.narrow(dim, batch, missing)))
        captured.replay()
        return tuple(output[:batch].clone() for output in captured.outputs)


@dataclass(frozen=True)
class GraphRunners:
    """CUDA graphs of denoising (plain, and with a drawing), of decoding by each decoder, and of the PNG encoder.

    Without graphs the server encodes PNG files.
    """

    plain: GraphRunner
    decode: GraphRunner
    png: GraphRunner
    controlled: GraphRunner | None
    recorder: GraphCapture  # captures them and the text stage's graphs
    fast_decode: GraphRunner | None = None

    def capture(self) -> dict[str, str]:
        """Captures every graph. Returns graph -> reason of those that could not be captured."""
        each = {"decode": self.decode, "fast decode": self.fast_decode, "denoise": self.plain}
        each |= {"denoise with a drawing": self.controlled, "PNG": self.png}
        reasons = {name: runner.capture() for name, runner in each.items() if runner is not None}
        return {name: reason for name, reason in reasons.items() if reason is not None}


def _pinned_for_copy(value: Tensor, view: Tensor) -> Tensor:
    """Pins a host `value` that goes to a `view` on a card, so that the copy does not block this thread."""
    if value.device.type == "cpu" and view.device.type == "cuda":
        return value.contiguous().pin_memory()
    return value


class CudaGraphCapture:
    """Captures CUDA graphs with one memory pool and one side stream; CUDA calls of other threads do not disturb it.

    Releases the memory of a warm-up before the capture, so that the two never add up. After a failed capture the next
    ones take another pool and stream.
    """

    def __init__(self) -> None:
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._begin()

    def _begin(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs

    def warm(self, launch: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """Raises CaptureError; torch.OutOfMemoryError; torch.AcceleratorError if the device is lost."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            return graph.replay, self._launched_into(graph, launch)
        except torch.OutOfMemoryError:
            self._recover(graph)
            raise
        except Exception as error:  # of PyTorch, Triton or a vendor's runtime
            self._recover(graph)
            raise CaptureError(f"not captured: {in_one_line(error)}") from error

    def _launched_into(
        self, graph: torch.cuda.CUDAGraph, launch: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        # As torch.cuda.graph does, without its garbage collection before each of some forty captures.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = launch()
            except BaseException:
                with suppress(RuntimeError):  # "a previous error during capture", which is the one that is raised
                    graph.capture_end()
                raise
            graph.capture_end()
        return outputs

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Makes PyTorch forget a failed capture. Raises torch.AcceleratorError if the device is lost.

        If cudaStreamEndCapture fails, PyTorch before 2.12 goes on to allocate for the graph (pytorch/pytorch#180395),
        and every torch.cuda.empty_cache is an error. The allocator of pinned memory cannot be told from Python. It
        refuses the same pool, and it may ask the graph, which therefore stays.
        """
        with suppress(RuntimeError):
            graph.reset()
        with suppress(RuntimeError):  # "not currently recording": PyTorch did it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._failed.append(graph)
        torch.cuda.synchronize()
        self._begin()


class EagerReplay:
    """Captures without a device: a replay launches again and copies into the same outputs.

    It saves no time; it lets tests run everything but the CUDA calls on any machine.
    """

    def warm(self, launch: Callable[[], object]) -> None:
        launch()

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        outputs = launch()

        def replay() -> None:
            for output, fresh in zip(outputs, launch(), strict=True):
                output.copy_(fresh)

        return replay, outputs
