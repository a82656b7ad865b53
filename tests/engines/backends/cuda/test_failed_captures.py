"""Captures that fail, with a stand-in for PyTorch's CUDA graphs that keeps the state of its allocators."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.backends.cuda.graphs import CudaGraphCapture, GraphKey, GraphRunner, Inputs, InputSpec
from engines.errors import CaptureError

Pool = tuple[int, int]
SPECS = {"x": InputSpec(torch.float32, lambda key: (key.bucket, 3))}
CPU = torch.device("cpu")


class Cuda:
    """PyTorch's CUDA as far as a capture sees it: CUDAGraph.cpp, CUDACachingAllocator.cpp, CachingHostAllocator.h.

    ends: capture_end ends the allocation to the pool where cudaStreamEndCapture fails too, as since 2.12
    (pytorch/pytorch#180395). releases: `reset` does, as since 2.14 (#190348). lost: no call succeeds any more.
    """

    def __init__(self, *, ends: bool, releases: bool):
        self.ends, self.releases = ends, releases
        self.pools, self.streams = 0, 0
        self.device_pools, self.host_pools = set[Pool](), set[Pool]()
        self.capturing = self.invalid = self.lost = False
        self.endings: list[str] = []

    def check(self) -> None:
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    def forbid(self) -> None:
        """Does what no graph can hold."""
        if self.capturing:
            self.invalid = True
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore")

    def handle(self) -> Pool:
        self.pools += 1
        return 0, self.pools

    def stream(self) -> Any:
        self.streams += 1
        return SimpleNamespace(wait_stream=lambda _: None, number=self.streams)

    def empty_cache(self) -> None:
        self.check()
        if self.device_pools:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end_allocation(self, _device: int, pool: Pool) -> None:
        if pool not in self.device_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.device_pools.remove(pool)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.pool = cuda, (0, 0)

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if pool in self.cuda.device_pools | self.cuda.host_pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pool = pool
        self.cuda.device_pools.add(pool)
        self.cuda.host_pools.add(pool)
        self.cuda.capturing, self.cuda.invalid = True, False

    def capture_end(self) -> None:
        self.cuda.capturing = False
        failed = self.cuda.invalid or self.cuda.lost
        if self.cuda.ends or not failed:
            self.cuda.device_pools.discard(self.pool)
            self.cuda.host_pools.discard(self.pool)
        self.cuda.endings.append("failed" if failed else "made")
        if failed:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture\nmore")

    def reset(self) -> None:
        if self.cuda.releases:
            self.cuda.device_pools.discard(self.pool)
            self.cuda.host_pools.discard(self.pool)

    def replay(self) -> None:
        """Does nothing: results are those of the capture."""


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["2.11", "2.12", "2.14"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    ends, releases = request.param
    made = Cuda(ends=ends, releases=releases)
    there: dict[str, Any] = {
        "CUDAGraph": lambda: Graph(made),
        "graph_pool_handle": made.handle,
        "Stream": made.stream,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "stream": lambda _: nullcontext(),
        "current_device": lambda: 0,
        "synchronize": made.check,
        "empty_cache": made.empty_cache,
    }
    for name, value in there.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end_allocation, raising=False)
    yield made
    assert not made.device_pools


def runner_of(recorder: CudaGraphCapture, work: Callable[[Tensor], Tensor], buckets: tuple[int, ...] = (1,)) -> Any:
    def computation(inputs: Inputs) -> tuple[Tensor, ...]:
        return (work(inputs["x"]),)

    return GraphRunner(lambda: computation, SPECS, buckets, [(1, 1)], (1,), recorder, CPU)


def run(runner: GraphRunner, x: Tensor) -> tuple[tuple[Tensor, ...], int | None]:
    return runner.run({"x": x}, GraphKey(x.shape[0], 1, 1, 1))


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_the_stage_runs_without_a_graph_and_the_others_are_captured(cuda: Cuda) -> None:
    def refused(x: Tensor) -> Tensor:
        cuda.forbid()
        return 3 * x

    recorder = CudaGraphCapture()
    first, bad, last = (runner_of(recorder, work) for work in (doubled, refused, doubled))
    assert first.capture() is None
    reason = "not captured: AcceleratorError: CUDA error: operation not permitted when stream is capturing"
    assert bad.capture() == reason == bad.failure, "the first error, not the one that follows from it"
    assert last.capture() is None
    assert (first.ready, bad.ready, last.ready) == (True, False, True)
    x = torch.ones(1, 3)
    (made,), bucket = run(bad, x)
    assert torch.equal(made, 3 * x)
    assert bucket is None
    assert bad.uncaptured == {GraphKey(1, 1, 1, 1): 1}
    assert [run(one, x)[1] for one in (first, last)] == [1, 1]
    assert (cuda.pools, cuda.streams) == (2, 2), "PyTorch refuses the pool of a failed capture"


def test_a_capture_that_fails_without_an_error_of_its_own(cuda: Cuda) -> None:
    """A call may spoil a capture and return no error; the end of the capture tells."""

    def spoiled(x: Tensor) -> Tensor:
        cuda.invalid = cuda.capturing
        return x

    recorder = CudaGraphCapture()
    assert "failed due to a previous error during capture" in str(runner_of(recorder, spoiled).capture())
    assert runner_of(recorder, doubled).capture() is None


def test_an_error_that_is_not_cudas(cuda: Cuda) -> None:
    def unsound(x: Tensor) -> Tensor:
        if cuda.capturing:
            raise ValueError("another matter")
        return x

    recorder = CudaGraphCapture()
    assert runner_of(recorder, unsound).capture() == "not captured: ValueError: another matter"
    assert runner_of(recorder, doubled).capture() is None


def test_a_stage_is_tried_once(cuda: Cuda) -> None:
    """A failed capture keeps its memory in PyTorch before 2.14, so the rest of its stage is not tried."""

    def large_only(x: Tensor) -> Tensor:
        if x.shape[0] < 4:
            cuda.forbid()
        return 2 * x

    runner = runner_of(CudaGraphCapture(), large_only, (1, 2, 4))
    reason = runner.capture()
    assert runner.capture() == reason is not None
    assert cuda.endings == ["made", "failed"]
    for batch, bucket in ((1, None), (2, None), (3, 4), (4, 4)):
        x = torch.ones(batch, 3)
        (made,), ran = run(runner, x)
        assert ran == bucket
        assert made.shape == x.shape
        assert bucket is not None or torch.equal(made, 2 * x)


def test_a_lost_device_ends_the_start(cuda: Cuda) -> None:
    def lost(x: Tensor) -> Tensor:
        cuda.lost = cuda.invalid = cuda.capturing
        cuda.check()
        return x

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        runner_of(CudaGraphCapture(), lost).capture()
    cuda.device_pools.clear()


def test_lack_of_memory_is_told_as_such(cuda: Cuda) -> None:
    def exhausted(x: Tensor) -> Tensor:
        if cuda.capturing:
            cuda.invalid = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    recorder = CudaGraphCapture()
    with pytest.raises(torch.OutOfMemoryError):
        runner_of(recorder, exhausted).capture()
    assert runner_of(recorder, doubled).capture() is None


@pytest.mark.gpu
@torch.inference_mode()
def test_a_card_captures_again_after_a_failed_capture() -> None:
    device, recorder = torch.device("cuda"), CudaGraphCapture()
    x = torch.ones(4, device=device)

    def copied() -> tuple[Tensor, ...]:
        y = x + 1
        y[0] = 256  # from the host
        return (y,)

    def waited() -> tuple[Tensor, ...]:
        return (x * float(x.sum()),)

    def kept() -> tuple[Tensor, ...]:
        return (x * 2,)

    for launch in (copied, waited, kept, waited, kept):
        recorder.warm(launch)  # empties PyTorch's cache of memory
        if launch is not kept:
            with pytest.raises(CaptureError):
                recorder.record(launch)
            assert not torch.cuda.is_current_stream_capturing()
            continue
        replay, (made,) = recorder.record(launch)
        made.zero_()
        replay()
        assert made.tolist() == [2.0] * 4
    held = torch.empty(4).pin_memory()
    held.copy_(x, non_blocking=True)
    torch.cuda.synchronize()
    assert held.tolist() == [1.0] * 4
