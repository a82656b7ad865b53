"""bench.report: results appear on the page, and the page in docs/ matches the results."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.errors import BenchError
from bench.latency.headline import CARD, CARD_DIFFUSERS, read_headline
from bench.report import main, read_results, render

ROOT = Path(__file__).parents[2]
MACHINE = {
    "date": "2026-01-02",
    "cpu": "a processor",
    "cores": 2,
    "load_average": 1.5,
    "memory_gib": 8,
    "python": "3.11",
    "torch": "2.13",
    "revision": "abc",
}
SPREAD = {"p50": 1.5, "p95": 2.0, "p99": 2.5, "mean": 1.6, "max": 3.0, "count": 5}


def latency(**changes: Any) -> dict[str, Any]:
    side = {
        "backend": "eager",
        "precision": "bf16",
        "parity_to_fp32": {"psnr_db": 41.5, "max_abs": 9.0},
        "seconds": dict.fromkeys(("text", "denoise", "decode", "total"), SPREAD),
    }
    return {
        "program": "bench.latency",
        "command": "python -m bench.latency --model m",
        "machine": MACHINE,
        "model": "m",
        "size": [64, 32],
        "steps": 1,
        "batch": 2,
        "vs": "diffusers",
        "device": "cpu",
        "ours": side,
        "theirs": side,
        "ratio": 3.21,
        "ratios": {"text": 9.1, "denoise": 1.1, "decode": 2.2},
        "parity_to_each_other": {"psnr_db": 51.0},
        "prompt_tokens": {"mean": 20.0},
    } | changes


def load() -> dict[str, Any]:
    return {
        "program": "bench.load",
        "command": "python -m bench.load --rate 9 --seconds 1",
        "machine": MACHINE | {"load_average": 7.0},
        "engine": {"checkpoint": "fake", "backend": "fake", "device": "none"},
        "loop": "open",
        "rate": 9.0,
        "concurrency": None,
        "throughput": 8.5,
        "goodput": 8.0,
        "deadline_ms": 100.0,
        "statuses": {"200": 7, "429": 2},
        "lost": 0,
        "latency_ms": SPREAD,
        "overhead_ms": SPREAD,
        "size": [64, 64],
        "format": "png",
        "stages_ms": dict.fromkeys(("text", "denoise", "decode", "encode"), SPREAD),
        "batch": {"mean_size": 1.25},
        "check": {"kind": "fake", "checked": 7, "wrong": 0},
        "memory_bytes": {"growth": 0.0123},
    }


def test_a_page_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.json").write_text(json.dumps(latency()))
    (tmp_path / "two.json").write_text(json.dumps(load()))
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "bench.md").read_text()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["Caveats", "Latency against diffusers", "Under load", "Reproduction"]
    for words in ("64x32", "3.21", "41.5", "9/s", "1.23%", "| 2 ", "0 of 7 (fake)"):
        assert words in page
    assert "Nothing here was measured on a GPU" in page
    assert "other work during two:" in page
    assert "python -m bench.latency --model m | tail -1 > bench/results/one.json" in page
    assert "bench-latency.svg" in capsys.readouterr().out


def test_a_measurement_on_a_gpu_is_not_denied() -> None:
    assert "Nothing here was measured on a GPU" not in render({"one": latency(device="cuda:0")})["bench.md"]


@pytest.mark.parametrize("text", ["{", "[]", '{"program": "bench.other"}'])
def test_files_that_are_no_results_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 3
    assert "needed is" in capsys.readouterr().err


def test_the_page_in_docs_is_current() -> None:
    folder = ROOT / "bench" / "results"
    results = read_results(folder)
    for name, text in render(results, read_headline(folder, results)).items():
        assert (ROOT / "docs" / "figures" / name).read_text() == text, "run python -m bench.report"


def test_the_headline_is_of_the_measured_files_alone() -> None:
    folder = ROOT / "bench" / "results"
    results = read_results(folder)
    headline = read_headline(folder, results)
    assert headline
    page = headline.page()
    for words in (
        "26.0 ms in bf16, 22.8 ms in fp8",
        "22.7 ms",
        "101 to 122 ms",
        "206 to 220 ms",
        "54.6",
        "10.8 s in int8",
    ):
        assert words in page
    assert all("projection" not in plot.lower() for plot in headline.plots().values())
    assert "484" in headline.plots()["bench-servers.svg"]


def test_a_folder_without_the_cards_files_has_no_headline(tmp_path: Path) -> None:
    results = read_results(ROOT / "bench" / "results")
    assert read_headline(tmp_path, results) is None
    for name in (CARD, CARD_DIFFUSERS):
        (tmp_path / name).write_text("no lines of JSON")
    with pytest.raises(BenchError, match="not JSON lines"):
        read_headline(tmp_path, results)
