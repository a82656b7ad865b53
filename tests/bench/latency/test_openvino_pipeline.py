"""bench.latency --vs openvino: the protocol with the process of the other environment, played by a stand-in."""

import json
import sys
from pathlib import Path

import pytest

from bench.latency import openvino_pipeline
from bench.latency.__main__ import main

STAND_IN = """#!{python}
import json, sys
import numpy as np
print(json.dumps({{"versions": {{"optimum-intel": "0"}}}}), flush=True)
calls = open({calls!r}, "a")
print(json.dumps(sys.argv[2:]), file=calls, flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    print(line, end="", file=calls, flush=True)
    if number == {dies_after}:
        sys.exit("out of memory")
    size = (len(request["prompts"]), request["height"], request["width"], 3)
    np.save(request["images"], np.full(size, 128, np.uint8))
    seconds = {{"text": 1.0, "denoise": 2.0, "decode": 3.0, "total": 6.0}}
    print(json.dumps({{"seconds": seconds, "peak_bytes": 2**30}}), flush=True)
"""


def stand_in(folder: Path, dies_after: int = -1) -> tuple[Path, Path]:
    """Returns a program that speaks the child's protocol, and the file of what it was asked."""
    program, calls = folder / "python", folder / "calls"
    program.write_text(STAND_IN.format(python=sys.executable, calls=str(calls), dies_after=dies_after))
    program.chmod(0o755)
    return program, calls


def run(folder: Path, program: Path, *flags: str) -> int:
    arguments = ["--model", str(folder), "--precision", "fp32", "--vs-precision", "bf16", "--runs", "2", "--size", "64"]
    return main([*arguments, "--vs-python", str(program), *flags])


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(openvino_pipeline, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(("vs", "flags"), [("openvino", []), ("openvino-static", ["--static"])])
def test_both_get_the_same_workloads(
    vs: str, flags: list[str], folder: Path, tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, calls = stand_in(tmp_path)
    assert run(folder, program, "--vs", vs) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["theirs"]["seconds"]["decode"]["p50"] == 3.0
    assert result["ratios"]["text"] == pytest.approx(1.0 / result["ours"]["seconds"]["text"]["p50"], rel=0.01)
    assert result["parity_to_each_other"]["psnr_db"] < 60
    (source, out, *given), *requests = map(json.loads, calls.read_text().splitlines())
    assert given == flags
    assert (Path(source) / "model_index.json").exists()
    assert Path(out).parent.parent == runs
    assert [(len(one["prompts"]), one["width"], one["seeds"]) for one in requests] == [
        (1, 64, [2]),  # the warm-up comes first
        (1, 64, [0]),
        (1, 64, [1]),
    ]


def test_the_end_of_the_child_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, _ = stand_in(tmp_path, dies_after=1)
    assert run(folder, program, "--vs", "openvino", "--no-reference") == 3
    message = "error: vs: optimum-intel's process ended with code 1: out of memory"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_an_environment_that_is_absent_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, Path("absent/python"), "--vs", "openvino-int8", "--no-reference") == 3
    assert "make openvino" in capsys.readouterr().err
