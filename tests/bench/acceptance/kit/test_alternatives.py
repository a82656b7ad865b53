"""Alternatives of kernels, and precisions, run on a CPU as well: by references, and without meaning for time."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance.kit import alternatives, precisions


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_alternatives_of_kernels_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert alternatives.main(["--device", "cpu", "--calls", "1"]) == 0
    rows = last_line(capsys)["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    by_what: dict[str, list[float]] = {}
    for row in rows:
        assert row["ms"] > 0
        by_what.setdefault(row["what"], []).append(row["sqnr_db"])
    assert len(by_what) == 8  # four products of a block, its attention, two of the text encoder, one of many rows
    for what, (first, *others) in by_what.items():
        assert first > 100, what
        assert all(db > (100 if "attention" in what else 24) for db in others), what


def test_one_alternative_that_fails_costs_itself_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(alternatives, "SCALED_PRODUCT", alternatives.SCALED_PRODUCT.__class__("x", fails, fails))
    assert alternatives.main(["--device", "cpu", "--calls", "1"]) == 0
    rows = last_line(capsys)["rows"]
    failed = [row for row in rows if "error" in row]
    assert {row["error"] for row in failed} == {"RuntimeError: no such product"}
    assert len(failed) == 4 < len(rows)


def test_precisions_are_compared_by_the_same_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model", str(folder), "--device", "cpu", "--precisions", "fp32,bf16", "--batches", "1", "--runs", "1"]
    assert precisions.main(line) == 0
    exact, rounded = last_line(capsys)["rows"]
    assert (exact["precision"], rounded["precision"]) == ("fp32", "bf16")
    assert exact["max_abs"] == 0 < rounded["max_abs"]
    assert 15 < rounded["psnr_db"] < 80
    assert all(row[stage]["p50"] > 0 for row in (exact, rounded) for stage in precisions.STAGES)


@pytest.mark.gpu
def test_a_card_times_every_alternative(capsys: pytest.CaptureFixture[str]) -> None:
    assert alternatives.main(["--calls", "5"]) == 0
    found = last_line(capsys)["rows"]
    assert not [row for row in found if "error" in row]
    assert all(row["ms"] > 0 for row in found)
