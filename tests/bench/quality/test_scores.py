"""bench.quality: each way to run a checkpoint gets the same captions, and is held against the first."""

import json
from pathlib import Path

import pytest

from bench.quality.__main__ import main


def test_variants_and_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = "eager:fp32,diffusers:fp32,eager:bf16"
    arguments = ["--model", str(folder), "--variants", variants, "--steps", "1,3", "--prompts", "6", "--max-batch", "4"]
    assert main([*arguments, "--schedule", "diffusers", "--latency-runs", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["variant"], row["steps"]): row for row in found["rows"]}
    assert list(rows) == [(variant, steps) for variant in variants.split(",") for steps in (1, 3)]
    for steps in (1, 3):
        assert rows["eager:fp32", steps]["max_abs"] == 0
        assert rows["diffusers:fp32", steps]["max_abs"] <= 1
        assert rows["eager:bf16", steps]["max_abs"] > 1
    assert all(row["mean"] == 0 for row in found["rows"])  # this checkpoint draws noise


def test_other_variants_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--variants", "eager"])
    assert "needed is <backend>:<precision>" in capsys.readouterr().err
    assert main(["--model", str(folder), "--variants", "diffusers:int3"]) == 3
    assert "diffusers runs in fp32" in capsys.readouterr().err
