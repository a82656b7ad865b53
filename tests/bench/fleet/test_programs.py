"""python -m bench.fleet: its last line, its refusals, and an H100 as it was measured."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.fleet.__main__ import main
from bench.fleet.arrivals import parse_mix, read_arrivals
from bench.fleet.capacity import main as capacity
from bench.fleet.stages import load_stages
from bench.fleet.validation import arrivals
from bench.harness.errors import BenchError

H100 = str(Path(__file__).resolve().parents[3] / "bench" / "results" / "h100-2026-11-27.jsonl")


def run_fleet(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(flags) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_the_last_line_has_what_the_contract_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "fleet.svg"
    flags = ("--cards", "2", "--rate", "40", "--seconds", "20", "--stages", "fake:50", "--plot", str(plot))
    result = run_fleet(capsys, *flags)
    assert {"p50_ms", "p95_ms", "p99_ms", "goodput", "refused", "events"} <= set(result)
    assert 50 <= result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"]
    ElementTree.parse(plot)


@pytest.mark.parametrize(("clients", "images_s", "p50_ms"), [(1, 39.0, 25.67), (8, 48.8, 164.35), (32, 54.6, 653.8)])
def test_an_h100_is_foretold_as_it_was_measured(
    clients: int, images_s: float, p50_ms: float, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_fleet(capsys, "--cards", "1", "--clients", str(clients), "--seconds", "30", "--stages", H100)
    assert result["throughput"] == pytest.approx(images_s, rel=0.1)
    assert result["p50_ms"] == pytest.approx(p50_ms, rel=0.1)


def test_what_was_not_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cards", "1", "--rate", "9", "--mix", "512:1:1", "--stages", H100]) == 3
    assert "no times of 512x512" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--cards", "1"], ["--cards", "1", "--rate", "1", "--lose", "one"]])
def test_a_question_that_is_none_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--stages", "fake:10"]) == 3
    assert "needed is" in capsys.readouterr().err


def test_fp8_decodes_faster() -> None:
    bf16, fp8 = (load_stages(H100, precision).batches[1024, 1024, 1][8].each for precision in ("bf16", "fp8"))
    assert fp8 == pytest.approx(bf16 - 0.003315)


def test_recorded_arrivals_are_read(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.jsonl"
    path.write_text('{"at": 2, "steps": 4}\n{"at": 1}\n')
    assert [(at, job.steps) for at, job in read_arrivals(path)] == [(1.0, 1), (2.0, 4)]
    path.write_text("[]\n")
    with pytest.raises(BenchError, match="needed are lines"):
        read_arrivals(path)


def test_a_mix_is_read() -> None:
    (large, small) = parse_mix("1024:1:0.8,640x384:2:0.2")
    assert (large.width, small.width, small.height, small.steps, small.share) == (1024, 640, 384, 2, 0.2)
    with pytest.raises(BenchError, match="SIZE:STEPS:SHARE"):
        parse_mix("1024")


def test_capacity_tells_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity(["--stages", H100, "--seconds", "10", "--events", "2000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["rate"] for row in result["rates"]} == {10, 1000, 100_000}
    assert [row["lost"] for row in result["losses"]] == [0, 1, 3]


def test_validation_foretells_when_the_generator_sends() -> None:
    assert arrivals(10.0, 3, 0) == sorted(arrivals(10.0, 3, 0))
    assert len(arrivals(10.0, 3, 0)) == 3
