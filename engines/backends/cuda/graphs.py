"""One CUDA graph per (bucket, height, width, steps): all steps, or decode and conversion to uint8, as one launch.

The bookkeeping (GraphRunner: which bucket, padding, order, buffers, what was not captured) knows nothing of CUDA; the
calls (CudaGraphCapture) decide nothing. Rules, from PyTorch's notes on CUDA graphs and NVIDIA's guide: largest shape
first and one shared memory pool, so that smaller graphs fit into its blocks; static inputs; warm-ups on a side stream
before each capture; graphs of a pool never run at once; results are copied before the next replay. Everything is
captured before the engine is ready: a shape that was not runs as it is and is counted, never captured inside a request.
A graph owns what it runs through: its chain, whose execution contexts and buffers it reads, lives as long as it does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engines.types import smallest_fitting

WARM_UPS = 2


class GraphKey(NamedTuple):
    """What a graph is captured for; height and width are the latent's."""

    bucket: int
    height: int
    width: int
    steps: int


@dataclass(frozen=True)
class InputSpec:
    """One input of a chain: its type, its shape for a key, and the dimension that is the batch."""

    dtype: torch.dtype
    shape: Callable[[GraphKey], tuple[int, ...]]
    batch_dim: int = 0


Inputs = Mapping[str, Tensor]
Replay = Callable[[], None]


class Capturable(Protocol):
    """Denoise or Decode (engines.pipeline.denoise_decode); outputs have the batch first."""

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]: ...


class GraphCapture(Protocol):
    """What a device does. `record` runs `launch` once more and gives what runs it again on the same memory."""

    def warm(self, launch: Callable[[], object]) -> None: ...

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]: ...


@dataclass(frozen=True)
class _Captured:
    inputs: Inputs  # views of the shared buffers
    outputs: tuple[Tensor, ...]
    replay: Replay
    chain: Capturable  # what the graph runs through


class GraphRunner:
    """Callable like the chain it captures.

    make_chain: called once per graph and once for what is not captured, so that each may hold an execution context of
    its own. inputs: every input of the chain by name.
    """

    def __init__(
        self,
        make_chain: Callable[[], Capturable],
        inputs: Mapping[str, InputSpec],
        buckets: Sequence[int],
        sides: Iterable[tuple[int, int]],
        steps: Iterable[int],
        recorder: GraphCapture,
        device: torch.device,
    ):
        self._make_chain, self._specs, self._recorder, self._device = make_chain, inputs, recorder, device
        self._plain = make_chain()
        self._buckets = tuple(sorted(buckets))
        keys = {GraphKey(b, *side, s) for b in self._buckets for side in sides for s in steps}
        self.capture_order = tuple(
            sorted(keys, key=lambda key: (key.bucket * key.height * key.width, key.steps), reverse=True)
        )
        self._buffers = {
            name: torch.zeros(max((prod(spec.shape(key)) for key in keys), default=0), dtype=spec.dtype, device=device)
            for name, spec in inputs.items()
        }
        self._captured: dict[GraphKey, _Captured] = {}
        self.uncaptured: Counter[GraphKey] = Counter()  # runs of shapes that no graph was captured for

    @property
    def ready(self) -> bool:
        return len(self._captured) == len(self.capture_order)

    @property
    def buckets(self) -> tuple[int, ...]:
        return self._buckets

    def capture(self) -> None:
        """Captures every graph, largest first; again does nothing."""
        for key in self.capture_order:
            if key not in self._captured:
                self._captured[key] = self._capture(key)
        self.uncaptured.clear()

    def __call__(self, inputs: Inputs, shape: GraphKey) -> tuple[Tensor, ...]:
        """The chain's outputs, which are the caller's own, for `inputs` of this shape (`bucket` is their batch)."""
        return self.run(inputs, shape)[0]

    def run(self, inputs: Inputs, shape: GraphKey) -> tuple[tuple[Tensor, ...], int | None]:
        """The outputs, and the bucket of the graph that made them; None where the chain ran as it is."""
        bucket = smallest_fitting(shape.bucket, self._buckets) if shape.bucket <= self._buckets[-1] else None
        captured = None if bucket is None else self._captured.get(shape._replace(bucket=bucket))
        if captured is None:
            self.uncaptured[shape] += 1
            return self._plain({name: value.to(self._device) for name, value in inputs.items()}), None
        return self._replay(captured, inputs, shape.bucket), bucket

    def _capture(self, key: GraphKey) -> _Captured:
        views = {
            name: self._buffers[name][: prod(spec.shape(key))].view(spec.shape(key))
            for name, spec in self._specs.items()
        }
        chain = self._make_chain()
        for _ in range(WARM_UPS):
            self._recorder.warm(lambda: chain(views))
        replay, outputs = self._recorder.record(lambda: chain(views))
        return _Captured(views, outputs, replay, chain)

    def _replay(self, captured: _Captured, inputs: Inputs, batch: int) -> tuple[Tensor, ...]:
        for name, view in captured.inputs.items():
            dim = self._specs[name].batch_dim
            view.narrow(dim, 0, batch).copy_(_fast_to_copy(inputs[name], view), non_blocking=True)
            # The rest of the bucket repeats the last job: rows never meet, and what is left over may be no number.
            missing = view.shape[dim] - batch
            if missing:
                last = view.narrow(dim, batch - 1, 1)
                view.narrow(dim, batch, missing).copy_(last.expand_as(view.narrow(dim, batch, missing)))
        captured.replay()
        return tuple(output[:batch].clone() for output in captured.outputs)


def _fast_to_copy(value: Tensor, view: Tensor) -> Tensor:
    """`value`, in pinned memory where it lies on the host and `view` on a card: its copy does not stop this thread."""
    if value.device.type == "cpu" and view.device.type == "cuda":
        return value.contiguous().pin_memory()
    return value


class CudaGraphCapture:
    """The CUDA calls: one memory pool, one side stream, errors of other threads' CUDA use kept out of a capture.

    What a warm-up took is given back before a capture takes its own, so that the two never stand side by side.
    """

    def __init__(self) -> None:
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
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # As torch.cuda.graph does, without its garbage collection before each of some forty captures.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = launch()
            finally:
                graph.capture_end()
        return graph.replay, outputs


class EagerReplay:
    """A recorder without a device: a graph is the launch, run again into the same memory. It saves nothing; it lets
    everything but the CUDA calls run, and be checked, on any machine."""

    def warm(self, launch: Callable[[], object]) -> None:
        launch()

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        outputs = launch()

        def replay() -> None:
            for kept, fresh in zip(outputs, launch(), strict=True):
                kept.copy_(fresh)

        return replay, outputs
