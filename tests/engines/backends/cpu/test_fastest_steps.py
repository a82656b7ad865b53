"""The kind of a step is chosen by a measurement that is kept; all kinds compute the same."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.backends.cpu import timings
from engines.backends.cpu.fastest_steps import FastestSteps
from engines.backends.cpu.kernels.checked import load_library
from engines.backends.cpu.onednn_steps import BY_ROWS, DIRECT
from engines.backends.cpu.steps import Step
from engines.backends.cpu.tiled_steps import TiledSteps
from engines.backends.cpu.timings import FILE, Timings, Ways
from engines.models.dcae import ResBlock, Upsample


class Clock:
    """A clock that only our steps move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def steps(self, name: str, seconds: float, runs: list[str], computes: type = object) -> "TimedSteps":
        return TimedSteps(self, name, seconds, runs, computes)


class TimedSteps:
    """Computes nothing in a time of its own."""

    def __init__(self, clock: Clock, name: str, seconds: float, runs: list[str], computes: type) -> None:
        self.clock, self.name, self.seconds, self.runs, self.type = clock, name, seconds, runs, computes

    def computes(self, block: ResBlock | Upsample) -> bool:
        return isinstance(block, self.type)

    def res_block(self, _: ResBlock) -> Step:
        return self._run

    def upsample(self, _: Upsample) -> Step:
        return self._run

    def _run(self, x: Tensor) -> Tensor:
        self.runs.append(self.name)
        self.clock.seconds += self.seconds
        return x


def res_block(channels: int = 8) -> ResBlock:
    torch.manual_seed(0)
    return ResBlock(channels).requires_grad_(False)


def upsample(channels: int = 64) -> Upsample:
    torch.manual_seed(0)
    return Upsample(channels, channels, interpolate=True).requires_grad_(False)


IMAGE = torch.zeros(1, 8, 4, 4)


def test_workers_that_start_together_keep_one_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second worker measures while the first one does, and ends before it."""
    monkeypatch.setattr(timings, "_measure", lambda ways: {name: run() for name, run in ways.items()})
    second: list[dict[str, float]] = []

    def ways() -> Ways:
        second.append(Timings(tmp_path).of("block", ("a", "b"), lambda: {"a": lambda: 3.0, "b": lambda: 4.0}))
        return {"a": lambda: 2.0, "b": lambda: 1.0}

    assert Timings(tmp_path).of("block", ("a", "b"), ways) == second[0] == {"a": 3.0, "b": 4.0}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing unfinished


def test_the_fastest_is_built_and_the_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = Clock(monkeypatch), list[str]()
    kinds = {"slow": clock.steps("slow", 9, runs), "fast": clock.steps("fast", 0.001, runs)}
    steps = FastestSteps(tmp_path / "new", "direct", DIRECT, kinds)
    monkeypatch.setattr(DIRECT.__class__, "res_block", clock.steps("direct", 5, runs).res_block)
    steps.res_block(res_block())(IMAGE)
    assert runs[-1] == "fast"
    figures = "direct 5000.00 ms, slow 9000.00 ms, fast 1.00 ms"
    assert steps.reason == f"fast for ResBlock of 8 channels in float32 ({figures})"
    measured = len(runs)
    steps.res_block(res_block())
    again = FastestSteps(tmp_path / "new", "direct", DIRECT, kinds)
    again.res_block(res_block())
    assert len(runs) == measured
    assert again.reason == steps.reason
    again.res_block(res_block(16))
    assert len(runs) > measured


def test_other_kinds_are_another_measurement_beside_the_kept_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, runs = Clock(monkeypatch), list[str]()
    for name in ("one", "other", "one"):
        runs.clear()
        FastestSteps(tmp_path, "direct", DIRECT, {name: clock.steps(name, 1, runs)}).res_block(res_block())
    assert not runs


def test_what_no_other_kind_computes_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = Clock(monkeypatch), list[str]()
    steps = FastestSteps(tmp_path, "direct", DIRECT, {"other": clock.steps("other", 0, runs, Upsample)})
    expected = res_block()(IMAGE + 1)
    torch.testing.assert_close(steps.res_block(res_block())(IMAGE + 1), expected)
    assert not runs
    assert steps.reason == ""
    steps.upsample(upsample())
    assert runs


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}', "{"])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(content)
    clock, runs = Clock(monkeypatch), list[str]()
    FastestSteps(tmp_path, "direct", DIRECT, {"other": clock.steps("other", 1, runs)}).res_block(res_block())
    assert runs
    assert [list(kinds) for key, kinds in json.loads((tmp_path / FILE).read_text()).items() if "of 8 " in key] == [
        ["direct", "other"]
    ]


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    steps = FastestSteps(tmp_path / "file", "direct", DIRECT, {"by rows": BY_ROWS})
    torch.testing.assert_close(steps.res_block(res_block())(IMAGE + 1), res_block()(IMAGE + 1), rtol=0, atol=1e-5)


def test_a_user_without_a_home_measures_at_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: str) -> str:
        return "~"  # as os.path.expanduser without HOME and a passwd line

    monkeypatch.setattr("os.path.expanduser", no_home)
    clock, runs = Clock(monkeypatch), list[str]()
    for _ in range(2):
        runs.clear()
        kinds = {"other": clock.steps("other", 1, runs)}
        FastestSteps(Path("~/.cache"), "direct", DIRECT, kinds).res_block(res_block())
        assert runs


def test_all_kinds_compute_the_same(tmp_path: Path) -> None:
    library = load_library(tmp_path)
    assert library is not None, "a C compiler is needed"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 64, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    for kind in (DIRECT, BY_ROWS, TiledSteps(library)):
        actual = kind.res_block(res_block(64))(x.clone(memory_format=torch.preserve_format))
        torch.testing.assert_close(actual, res_block(64)(x), rtol=0, atol=1e-4)
        torch.testing.assert_close(kind.upsample(upsample())(x), upsample()(x), rtol=0, atol=1e-4)
