"""GraphRunner with a recorder on the CPU, whose graph is a launch on fixed memory."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engines.backends.cuda.graphs import (
    WARM_UPS,
    Capturable,
    CudaGraphCapture,
    EagerReplay,
    GraphKey,
    GraphRunner,
    Inputs,
    InputSpec,
    Replay,
    refusals,
)
from engines.sampler import sample

SIDES = ((4, 4), (2, 4))
SPECS = {
    "noise": InputSpec(torch.float32, lambda key: (key.steps, key.bucket, 3, key.height, key.width), batch_dim=1),
    "angles": InputSpec(torch.float32, lambda key: (key.steps, key.bucket), batch_dim=1),
    "guidance": InputSpec(torch.float32, lambda key: (key.bucket,)),
}


class CountingRecorder(EagerReplay):
    """Records its calls."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warm(self, launch: Callable[[], object]) -> None:
        self.events.append("warm")
        super().warm(launch)

    def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        self.events.append("record")
        return super().record(launch)


class Computations:
    """Makes computations and records the memory of their inputs."""

    def __init__(self) -> None:
        self.calls: list[list[dict[str, int]]] = []

    def make(self) -> Capturable:
        calls: list[dict[str, int]] = []
        self.calls.append(calls)

        def computation(inputs: Inputs) -> tuple[Tensor, ...]:
            calls.append({name: value.data_ptr() for name, value in inputs.items()})
            guidance = inputs["guidance"][:, None, None, None]
            clean = sample(lambda x, _: guidance * x.cos(), inputs["noise"][0], inputs["angles"], inputs["noise"][1:])
            return clean, clean.isfinite().all((1, 2, 3))

        return computation


def inputs(batch: int, side: tuple[int, int] = (4, 4), steps: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    angles = torch.linspace(1.5, 0.6, steps)[:, None].expand(-1, batch)
    noise = torch.randn(steps, batch, 3, *side, generator=generator)
    return {"noise": noise, "angles": angles, "guidance": torch.rand(batch, generator=generator)}


def shape(arguments: dict[str, Tensor]) -> GraphKey:
    steps, batch, _, height, width = arguments["noise"].shape
    return GraphKey(batch, height, width, steps)


def run(runner: GraphRunner, arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return runner(arguments, shape(arguments))


@pytest.fixture
def computations() -> Computations:
    return Computations()


@pytest.fixture
def recorder() -> CountingRecorder:
    return CountingRecorder()


@pytest.fixture
def runner(computations: Computations, recorder: CountingRecorder) -> GraphRunner:
    runner = GraphRunner(computations.make, SPECS, (1, 2, 4), SIDES, (1, 2), recorder, torch.device("cpu"))
    runner.capture()
    return runner


def expected(arguments: dict[str, Tensor]) -> Tensor:
    return Computations().make()(arguments)[0]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_replay_equals_the_chain(batch: int, side: tuple[int, int], steps: int, runner: GraphRunner) -> None:
    arguments = inputs(batch, side, steps)
    clean, finite = run(runner, arguments)
    torch.testing.assert_close(clean, expected(arguments), rtol=0, atol=0)
    assert finite.tolist() == [True] * batch
    assert not runner.uncaptured


def test_largest_first_and_every_combination_once(runner: GraphRunner, recorder: CountingRecorder) -> None:
    assert len(runner.capture_order) == 3 * 2 * 2 == len(set(runner.capture_order))
    assert runner.capture_order[0] == GraphKey(4, 4, 4, 2)
    areas = [key.bucket * key.height * key.width for key in runner.capture_order]
    assert areas == sorted(areas, reverse=True)
    assert recorder.events == (["warm"] * WARM_UPS + ["record"]) * 12


def test_ready_only_when_all_are_captured_and_nothing_is_captured_twice(
    computations: Computations, recorder: CountingRecorder
) -> None:
    runner = GraphRunner(computations.make, SPECS, (1,), SIDES, (1,), recorder, torch.device("cpu"))
    assert not runner.ready
    runner.capture()
    assert runner.ready
    before = list(recorder.events)
    runner.capture()
    assert recorder.events == before


def test_all_graphs_share_one_set_of_buffers_and_none_shares_a_chain(
    runner: GraphRunner, computations: Computations
) -> None:
    plain, *captured = computations.calls
    assert not plain
    assert len(captured) == 12
    addresses = {tuple(call.values()) for calls in captured for call in calls}
    assert len(addresses) == 1
    for count in (1, 4):
        run(runner, inputs(count))
    assert {tuple(call.values()) for calls in captured for call in calls} == addresses


def test_a_graph_keeps_what_it_runs_through() -> None:
    """CUDA's recorder holds no reference to the launch, and Python destroys an unreferenced context."""
    references: list[weakref.ref[Capturable]] = []

    def make() -> Capturable:
        computation = Computations().make()
        references.append(weakref.ref(computation))
        return computation

    class Forgetful(CountingRecorder):
        def record(self, launch: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
            return lambda: None, launch()

    runner = GraphRunner(make, SPECS, (1,), SIDES, (1,), Forgetful(), torch.device("cpu"))
    runner.capture()
    gc.collect()
    assert len(references) == 3
    assert all(reference() is not None for reference in references)


def test_buffers_are_as_large_as_the_largest_graph_needs(runner: GraphRunner) -> None:
    assert {name: buffer.numel() for name, buffer in runner._buffers.items()} == {
        "noise": 2 * 4 * 3 * 16,
        "angles": 8,
        "guidance": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (inputs(5), GraphKey(5, 4, 4, 1)),
        (inputs(1, (8, 8)), GraphKey(1, 8, 8, 1)),
        (inputs(2, (4, 4), 3), GraphKey(2, 4, 4, 3)),
    ],
    ids=["batch", "size", "steps"],
)
def test_an_unseen_shape_runs_as_it_is_and_is_counted(
    arguments: dict[str, Tensor], key: GraphKey, runner: GraphRunner, recorder: CountingRecorder
) -> None:
    before = list(recorder.events)
    for count in (1, 2):
        assert torch.equal(run(runner, arguments)[0], expected(arguments))
        assert runner.uncaptured == {key: count}
    assert recorder.events == before, "captured inside a request"


def test_before_the_capture_everything_runs_as_it_is(computations: Computations, recorder: CountingRecorder) -> None:
    runner = GraphRunner(computations.make, SPECS, (1, 2), SIDES, (1,), recorder, torch.device("cpu"))
    arguments = inputs(1)
    assert torch.equal(run(runner, arguments)[0], expected(arguments))
    assert runner.uncaptured == {GraphKey(1, 4, 4, 1): 1}
    assert recorder.events == []


def test_results_are_the_callers_own(runner: GraphRunner) -> None:
    first = run(runner, inputs(2))[0]
    before = first.clone()
    run(runner, {name: value + 1 for name, value in inputs(2).items()})
    assert torch.equal(first, before)


def test_the_rest_of_a_bucket_is_filled_with_numbers(runner: GraphRunner) -> None:
    arguments = inputs(4)
    arguments["noise"][:, 3] = float("nan")
    assert run(runner, arguments)[1].tolist() == [True, True, True, False]
    assert run(runner, inputs(3))[1].tolist() == [True] * 3
    assert runner._buffers["noise"].isfinite().all()


@pytest.mark.gpu
def test_cuda_graphs_equal_the_chain_on_the_card() -> None:
    device = torch.device("cuda")
    runner = GraphRunner(Computations().make, SPECS, (1, 2, 4), SIDES, (1, 2), CudaGraphCapture(), device)
    with torch.inference_mode():
        runner.capture()
        assert runner.ready
        for batch in (1, 2, 3, 4):
            for side in SIDES:
                for steps in (1, 2):
                    arguments = {name: value.to(device) for name, value in inputs(batch, side, steps).items()}
                    torch.testing.assert_close(run(runner, arguments)[0], expected(arguments), rtol=0, atol=0)
    assert not runner.uncaptured


@pytest.mark.gpu
def test_a_refused_graph_leaves_room_for_others_on_the_card() -> None:
    recorder, x = CudaGraphCapture(), torch.zeros(2, device="cuda")
    refused, (careless,) = recorder.record(lambda: (x + x.sum().item(),))
    assert len(recorder.refused) == 1
    recorder.warm(lambda: x + 1)
    replay, (careful,) = recorder.record(lambda: (x + 1,))
    x += 1
    for one in (refused, replay):
        one()
    assert (careless.tolist(), careful.tolist()) == ([3, 3], [2, 2])
    assert len(recorder.refused) == 1


class BrokenGraph:
    """Stands in for a torch.cuda.CUDAGraph whose capture CUDA ends, as torch tells it."""

    def capture_begin(self, **_: object) -> None:
        """Begins."""

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand its advice")


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Replaces the CUDA calls of CudaGraphCapture. Returns the allocations to a pool that it ended."""
    ended: list[tuple[object, ...]] = []
    stream = SimpleNamespace(wait_stream=lambda _: None)
    replaced = {
        "CUDAGraph": BrokenGraph, "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext,
        "graph_pool_handle": lambda: (0, 7), "current_device": lambda: 0, "synchronize": lambda: None,
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: ended.append(given))
    return ended


def test_work_that_no_graph_can_hold_is_launched_at_each_replay(
    no_card: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    recorder, x, refusing = CudaGraphCapture(), torch.zeros(2), [True]

    def launch() -> tuple[Tensor, ...]:
        if refusing.pop() if refusing else False:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand its advice")
        return (x + 1,)

    replay, (output,) = recorder.record(launch)
    assert output.tolist() == [1, 1]
    x += 4
    replay()
    assert output.tolist() == [5, 5]
    told = "CUDA error: operation not permitted when stream is capturing"
    assert recorder.refused == [told]
    assert told in caplog.text
    assert refusals(recorder) == f"; 1 could not be and are launched kernel by kernel: {told}"
    assert refusals(EagerReplay()) == ""
    assert no_card == [(0, (0, 7))], "torch before pytorch/pytorch#180395 would fail when memory is released"


@pytest.mark.usefixtures("no_card")
def test_lack_of_memory_ends_a_capture() -> None:
    def exhausted() -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        CudaGraphCapture().record(exhausted)
