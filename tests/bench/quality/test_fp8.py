"""bench.quality.fp8: one quantised layer harms less than all; the score is of fp8 images; the shipped one: slow."""

import json
from pathlib import Path

import pytest
import torch

from bench import report
from bench.quality import fp8
from bench.quality.fp8 import CPU, Fp8Checkpoint, main
from engines.build.quantization import quantised_layers
from engines.checkpoints.checkpoint import open_checkpoint

pytest.importorskip("modelopt", reason="the extra 'build' is not installed")


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict[str, object]]:
    code = main(list(line))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_layers_and_score_of_a_small_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--model", str(folder), "--prompts", "6", "--seeds", "1", "--images", "2"]
    code, result = run(capsys, *line)
    sensitivities = result["sensitivity"]
    checkpoint = open_checkpoint(str(folder))
    assert set(sensitivities["layers"]) == set(quantised_layers(checkpoint.load_transformer(torch.float32, CPU)))
    assert 5 < sensitivities["together_db"] < min(sensitivities["layers"].values()) < 80
    assert list(sensitivities["layers"].values()) == sorted(sensitivities["layers"].values())
    assert "proj_out" in sensitivities["kept_out"]
    assert (code, result["score"]["apart"]) == (0, 0.0), "noise scores nothing, in either precision"
    (tmp_path / "fp8-small.json").write_text(json.dumps(result))
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert f"{sensitivities['together_db']} dB with every layer" in (tmp_path / "bench.md").read_text()

    monkeypatch.setattr(fp8, "layer_sensitivity", lambda *_: sensitivities)
    scores = iter((0.5, 0.47))
    monkeypatch.setattr(
        fp8, "_score", lambda *_: {"mean": next(scores), "spread": 0.0, "categories": {"counting": 0.0}}
    )
    code, result = run(capsys, *line)
    assert (code, result["score"]["apart"]) == (1, -0.03)


def test_the_quantised_checkpoint_is_rounded(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    plain, rounded = (
        first.load_transformer(torch.float32, CPU) for first in (checkpoint, Fp8Checkpoint(**vars(checkpoint)))
    )
    channels = checkpoint.transformer.in_channels
    inputs = (torch.randn(1, channels, 8, 8), torch.randn(1, 4, checkpoint.transformer.caption_channels))
    with torch.inference_mode():
        first, second = (module(*inputs, torch.ones(1), torch.full((1,), 0.45)) for module in (plain, rounded))
    assert 0 < (first - second).abs().max() < first.abs().max()


@pytest.mark.slow
def test_fp8_of_the_shipped_checkpoint_scores_as_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "--model", "tiny", "--prompts", "500", "--seeds", "3")
    assert abs(result["score"]["apart"]) <= 0.02
    assert result["score"]["fp32"]["mean"] > 0.4
    assert code == 0
