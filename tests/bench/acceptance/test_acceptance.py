"""bench.acceptance runs every step but the card's own on a CPU, which proves a GPU host's command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.acceptance.__main__ import main, parsed
from bench.acceptance.plan import AcceptanceConfig, StepResult
from bench.acceptance.report import show
from bench.acceptance.steps import _largest_fitting, accept, run_step_in_subprocess
from bench.harness.errors import BenchError
from engines.errors import OutOfMemoryError

pytest.importorskip("onnx", reason="the extra 'build' is not installed")
pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")


def command(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    line = ["--device", "cpu", "--models", str(folder), "--engines", str(tmp_path / "engines")]
    line += ["--out", str(tmp_path / "results"), "--batches", "1,2", "--steps", "1,2", "--runs", "1"]
    return [*line, *more]


def written(tmp_path: Path) -> tuple[dict[str, Any], str]:
    [result], [page] = (list((tmp_path / "results").glob(f"*.{kind}")) for kind in ("json", "md"))
    assert result.stem == page.stem
    return json.loads(result.read_text()), page.read_text()


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    tmp_path = tmp_path_factory.mktemp("accept")
    return main(command(folder, tmp_path, "--precisions", "fp32", "--peers", "diffusers")), tmp_path


def test_everything_that_a_cpu_can_run_passes(run: tuple[int, Path]) -> None:
    code, tmp_path = run
    found, _ = written(tmp_path)
    outcomes = {step["name"]: (step["outcome"], step["reason"]) for step in found["steps"]}
    assert outcomes == dict.fromkeys(
        [
            "activation ranges",
            "build fp32",
            "pictures fp32",
            "graphs",
            "latency engine fp32",
            "latency eager",
            "latency diffusers",
        ],
        ("passed", None),
    )
    assert code == found["failed"] == 0


def test_the_figures_are_measured_ones(run: tuple[int, Path]) -> None:
    found, page = written(run[1])
    figures = {step["name"]: step["figures"] for step in found["steps"]}
    assert figures["activation ranges"]["decoder"]["peak"] > 0
    assert figures["build fp32"]["modules"]["decoder"]["parity"]["gate"] == "levels of 255 <= 1"
    images = figures["pictures fp32"]
    assert (images["batch"], images["same_twice"]) == (2, True)
    assert max(images["max_abs"], images["alone_max_abs"]) <= 2
    assert figures["graphs"]["uncaptured"] == 0
    assert figures["graphs"]["max_abs_to_eager"] <= 1
    assert figures["graphs"]["device"].startswith("no graphs")
    rows = [row for step in found["steps"] for row in step["rows"]]
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        assert row["seconds"]["total"]["count"] == 1
        assert row["pictures_per_second"] == pytest.approx(row["batch"] / row["seconds"]["total"]["p50"], rel=0.01)
        assert row["who"] in page
    assert found["card"] in page


def test_the_papers_figures_stand_beside_those_of_its_card_alone(run: tuple[int, Path]) -> None:
    found, page = written(run[1])
    assert "| H100 SXM" in page
    assert "100 to 180" in page
    [row] = [row for step in found["steps"] if step["name"] == "latency eager" for row in step["rows"][:1]]
    row["size"] = [1024, 1024]
    [step] = [step for step in found["steps"] if step["name"] == "latency eager"]
    step["model"], step["rows"] = "random:sprint-0.6b", [row]
    found["steps"] = [step]

    def beside(card: str) -> str:
        [line] = [line for line in show({**found, "card": card}).splitlines() if "1024x1024 |" in line]
        return line.split("|")[-2].strip()

    assert beside("NVIDIA H100 80GB HBM3") == "100 to 180"
    assert beside("NVIDIA GeForce RTX 4090") == "310 (laptop)"
    assert beside("NVIDIA L4") == "-"
    row["batch"] = 2
    assert beside("NVIDIA H100 80GB HBM3") == "-"


def test_the_report_takes_the_result(run: tuple[int, Path], tmp_path: Path) -> None:
    assert report.main(["--results", str(run[1] / "results"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "bench.md").read_text()
    assert "### Acceptance on" in text
    assert "Nothing here was measured on a GPU" in text


def test_a_step_that_fails_is_told_and_stops_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, compiled: bool = False) -> None:
        if compiled:
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        raise RuntimeError("the card fell off the bus\nand more")

    monkeypatch.setattr("bench.acceptance.steps.DiffusersPipeline", exhausted)
    monkeypatch.setattr("bench.acceptance.steps.run_calibration", exhausted)
    line = command(folder, tmp_path, "--precisions", "int4", "--batches", "1", "--steps", "1")
    assert main(line) == 1
    found, page = written(tmp_path)
    steps = {step["name"]: step for step in found["steps"]}
    reason = "RuntimeError: the card fell off the bus"
    for name in ("activation ranges", "latency diffusers"):
        assert (steps[name]["outcome"], steps[name]["reason"]) == ("failed", reason)
    assert steps["build int4"]["reason"] == "precision: got 'int4', a CPU engine is built in fp32, bf16"
    assert steps["pictures int4"]["outcome"] == steps["latency engine int4"]["outcome"] == "skipped"
    assert steps["latency diffusers-compiled"]["outcome"] == "skipped"
    assert steps["latency diffusers-compiled"]["reason"] == "diffusers is not installed"
    assert steps["latency eager"]["rows"]
    assert not steps["latency diffusers"]["rows"]
    assert found["failed"] == 3
    assert reason in page


def test_a_step_has_a_process_of_its_own_which_may_die(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = AcceptanceConfig(str(folder), torch.device("cpu"), tmp_path, ("fp32",), (64, 64), (1,), (1,), 1, (), ())
    alone = run_step_in_subprocess(plan, "pictures fp32")
    assert (alone.outcome, alone.reason) == ("skipped", "no engines in fp32 were built")

    def dies(*_: object) -> None:
        raise BenchError("its process died: SIGSEGV")

    monkeypatch.setattr("bench.acceptance.steps.run_in_subprocess", dies)
    monkeypatch.setattr("bench.acceptance.steps._free", lambda _: None)
    told: list[StepResult] = []
    accept(replace(plan, device=torch.device("cuda")), told.append)
    assert len(told) == 5
    assert {(step.outcome, step.reason) for step in told} == {("failed", "its process died: SIGSEGV")}


def test_what_was_found_is_kept_after_every_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def two_steps(plan: AcceptanceConfig, tell: Callable[[StepResult], object]) -> None:
        for name in ("one", "two"):
            tell(StepResult(plan.model, name, "failed", "a reason"))
            seen.append(len(written(tmp_path)[0]["steps"]))

    monkeypatch.setattr("bench.acceptance.__main__.accept", two_steps)
    assert main(command(folder, tmp_path)) == 1
    assert seen == [1, 2]
    assert written(tmp_path)[0]["failed"] == 2


def test_a_step_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = command(folder, tmp_path, "--batches", "1", "--steps", "1")
    assert main([*line, "--only", "latency eager"]) == 0
    [step] = written(tmp_path)[0]["steps"]
    assert step["name"] == "latency eager"
    assert step["figures"]["peak_bytes"] > 0
    assert main([*line, "--only", "no such step"]) == 3
    assert "--only: no step is called no such step" in capsys.readouterr().err


def test_the_largest_batch_that_fits_is_measured(tmp_path: Path) -> None:
    plan = AcceptanceConfig("tiny", torch.device("cpu"), tmp_path, (), (64, 64), (1, 2, 4, 8), (1,), 1, (), ())
    tried: list[int] = []

    def load(largest: int) -> int:
        tried.append(largest)
        if largest > 4:
            raise RuntimeError("indices are too narrow")
        if largest > room:
            raise OutOfMemoryError("no memory")
        return largest

    room = 2
    assert _largest_fitting(plan, load) == 2
    assert tried == [8, 4, 2]
    room = 0
    with pytest.raises(OutOfMemoryError):
        _largest_fitting(plan, load)


def test_without_a_gpu_the_default_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 3
    assert "torch sees no GPU; --device cpu runs what a CPU can" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [["--runs", "0"], ["--peers", "sdxl"], ["--batches", "one"]])
def test_a_wrong_word_is_refused(line: list[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(line)


@pytest.mark.gpu
def test_the_command_passes_on_the_card(folder: Path, tmp_path: Path) -> None:
    line = command(folder, tmp_path, "--device", "cuda", "--peers", "diffusers", "--precisions", "fp16")
    assert main(line) == 0
