"""The 3x3 convolution is chosen by a measurement that is kept; both kinds compute the same."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.backends.cpu.convolution import Conv, Edges, PackedConv
from engines.backends.cpu.fastest_conv import FastestConv
from engines.backends.cpu.timings import FILE
from engines.backends.cpu.winograd import WinogradConv


class Clock:
    """A clock that only our convolutions move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def conv(self, name: str, seconds: float, runs: list[str]) -> "TimedFactory":
        return TimedFactory(self, name, seconds, runs)


class TimedFactory:
    def __init__(self, clock: Clock, name: str, seconds: float, runs: list[str]) -> None:
        self.clock, self.name, self.seconds, self.runs = clock, name, seconds, runs

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Conv:
        packed = PackedConv(conv, silu=silu)

        def run(x: Tensor, edges: Edges | None = None) -> Tensor:
            self.runs.append(self.name)
            self.clock.seconds += self.seconds
            return packed(x, edges)

        return run


def conv(channels: int = 8) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)


def test_the_faster_one_is_built_and_the_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = Clock(monkeypatch), list[str]()
    factories = {"slow": clock.conv("slow", 0.002, runs), "fast": clock.conv("fast", 0.001, runs)}
    fastest = FastestConv(tmp_path / "new", factories)
    fastest(conv())(torch.zeros(1, 8, 4, 4))
    assert runs[-1] == "fast"
    assert fastest.reason == ("3x3 convolutions: fast for float32 8 to 8 channels (slow 2.00 ms, fast 1.00 ms)")
    measured = len(runs)
    fastest(conv())
    again = FastestConv(tmp_path / "new", factories)
    again(conv())
    assert len(runs) == measured
    assert again.reason == fastest.reason
    again(conv(16))
    assert len(runs) > measured


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}', "{"])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(content)
    clock, runs = Clock(monkeypatch), list[str]()
    FastestConv(tmp_path, {"a": clock.conv("a", 1, runs), "b": clock.conv("b", 2, runs)})(conv())
    assert runs
    assert [list(kinds) for key, kinds in json.loads((tmp_path / FILE).read_text()).items() if "8 to 8" in key] == [
        ["a", "b"]
    ]


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert isinstance(FastestConv(tmp_path / "file")(conv()), WinogradConv | PackedConv)


def test_a_user_without_a_home_measures_at_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: str) -> str:
        return "~"  # as os.path.expanduser without HOME and a passwd line

    monkeypatch.setattr("os.path.expanduser", no_home)
    clock, runs = Clock(monkeypatch), list[str]()
    factories = {"a": clock.conv("a", 1, runs), "b": clock.conv("b", 2, runs)}
    for _ in range(2):
        runs.clear()
        FastestConv(Path("~/.cache"), factories)(conv())
        assert set(runs) == {"a", "b"}


def test_both_kinds_compute_the_same(tmp_path: Path) -> None:
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    expected = nn.functional.silu(conv()(x))
    for kind in (WinogradConv, PackedConv):
        one = FastestConv(tmp_path / kind.__name__, {"only": kind})
        torch.testing.assert_close(one(conv(), silu=True)(x), expected, rtol=0, atol=1e-5)
