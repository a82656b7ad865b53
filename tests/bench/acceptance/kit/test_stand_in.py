"""The programs of a kit with the arguments that a card gets, on a stand-in for one that computes nothing.

What only a card's branches would show, as a wrong argument, is seen here: each step's command line is parsed by its own
program, and the programs of the kit run to their tables.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import build_engine
from bench.acceptance import __main__ as stages
from bench.acceptance.kit import alternatives, controlnet, dependent_launch, kernels, precisions, threads
from bench.acceptance.kit.calls import CALLS, Place, Step
from bench.acceptance.over_http import __main__ as over_http
from bench.budget.card import Card
from bench.budget.engine import _NoWeights, _Trusted
from bench.harness.errors import BenchError
from engines import loader
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.kernels.op import Launcher, Ops
from server.settings import Settings, load_settings

PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "bench.acceptance": stages.main,
    "bench.acceptance.over_http": over_http.main,
    **{f"bench.acceptance.kit.{one.__name__.rpartition('.')[2]}": one.main
       for one in (alternatives, controlnet, kernels, precisions, threads)},
}  # fmt: skip


class Launchable:
    """Stands in for a Triton kernel that is launched without engines.kernels.op."""

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_args, **_options: None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Yields a stand-in for an H100 that torch, the kernels and the loader of engines see."""
    made = Card("NVIDIA H100 80GB HBM3", 132, (9, 0))
    monkeypatch.setattr(Launcher, "of", classmethod(lambda *_: made.launcher))
    monkeypatch.setattr(loader, "_recorder", lambda *_: made.recorder)
    monkeypatch.setattr(loader, "_kernels", lambda *given: _Trusted(Ops(made.launcher), given[3].autoencoder))
    monkeypatch.setattr(dependent_launch, "add_one", Launchable())
    monkeypatch.setattr(alternatives, "CudaGraphCapture", lambda: made.recorder)
    with made.present():
        yield made


def weightless(name: str) -> Checkpoint:
    checkpoint = open_checkpoint(name)
    return replace(checkpoint, weights=_NoWeights(checkpoint.weights))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("torchvision.io")
    package.encode_jpeg = lambda planes, quality: planes.new_empty(1000 * quality)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", package)


@pytest.mark.usefixtures("card", "torchvision")
def test_alternatives_at_published_widths(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "_Drawn", lambda device: lambda *shape, **_: torch.empty(
        *shape, dtype=torch.bfloat16, device=device))  # fmt: skip
    keyed = list[bool]()
    monkeypatch.setattr(alternatives, "stable_cache_keys", lambda: keyed.append(True))
    assert alternatives.main(["--calls", "2"]) == 0
    assert keyed, "the kernels that the kit has compiled would not be found"
    rows = last_line(capsys)["rows"]
    assert not [row for row in rows if "error" in row]
    told = {row["what"] for row in rows}
    assert {"ten dependent launches", "noise, JPEG to the host", "gate and up, 256 rows", "qkv 1024x2240x6720"} <= told
    assert all("ms" in row for row in rows)


@pytest.mark.usefixtures("card")
def test_precisions_and_threads(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in (precisions, threads):
        monkeypatch.setattr(program, "open_checkpoint", weightless)
    assert precisions.main(["--model", str(folder), "--runs", "1"]) == 0
    rows = last_line(capsys)["rows"]
    assert [(row["precision"], row["batch"]) for row in rows] == [("bf16", 1), ("bf16", 8), ("fp8", 1), ("fp8", 8)]
    assert threads.main(["--model", str(folder), "--runs", "1", "--rounds", "1"]) == 0
    assert {row["batch"] for row in last_line(capsys)["rows"]} == {1, 8}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces what the programs measure; returns what they were asked for."""
    asked = list[Any]()
    empty: dict[str, Any] = {"rows": [], "blocks": 7, "parameters": 1, "jobs": 1, "seconds": {}, "failed": 0}

    def keep(*given: Any, **more: Any) -> dict[str, Any]:
        asked.append((given, more))
        return empty

    for program, name in (
        (alternatives, "compare"), (precisions, "compare"), (threads, "compare"), (controlnet, "write"),
        (kernels, "compile_all"), (stages, "run"),
    ):  # fmt: skip
        monkeypatch.setattr(program, name, keep)
    monkeypatch.setattr(stages, "show", lambda _: "")
    monkeypatch.setattr(kernels, "this_machine", lambda: SimpleNamespace(capability=(9, 0)))
    return asked


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("call", CALLS)
def test_each_program_understands_its_step(
    call: str, tmp_path: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "work", tmp_path / "out", rehearsal=False)
    place.work.mkdir()
    servers = list[Settings]()

    @contextmanager
    def no_server(flags: list[str]) -> Iterator[None]:
        servers.append(load_settings(flags, {}))
        raise BenchError("it is not started")
        yield

    monkeypatch.setattr(over_http, "running_server", no_server)
    monkeypatch.setattr(over_http, "_projected", lambda *given: seen.append(given))
    for step in CALLS[call](place):
        before = len(seen) + len(servers)
        _run(step)
        assert len(seen) + len(servers) == before + 1 or step.name.startswith("build"), step.name
    if call == "http":
        assert [(one.model, one.precision) for one in servers] == [
            ("random:sprint-0.6b", "fp8"), ("random:sprint-0.6b", "bf16"),
            ("random:sprint-0.6b", "fp8"), ("random:sprint-1.6b", "bf16"),
        ]  # fmt: skip
        assert [one.engine for one in servers] == ["none"] * 4
        assert [one.controlnet is not None for one in servers] == [False, False, True, False]


def _run(step: Step) -> None:
    """Runs the step's program in this process; of build_engine.py only its command line."""
    if step.arguments[0] == "build_engine.py":
        spec = build_engine.parse(list(step.arguments[1:]))
        assert (spec.vendor, spec.gpu) == ("native", "native")
        return
    code = PROGRAMS[step.arguments[1]](list(step.arguments[2:]))
    assert code == int("over_http" in step.arguments[1] and step.name != "counted"), step.name
