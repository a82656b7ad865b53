"""The instruction's keys and values in a folder: the same embeddings from them, and only for the same text encoder."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.pipeline import text_stage
from engines.pipeline.text_stage import TextStage, load_text_stage

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(text_stage, "SLOW_PREFIX_S", 0.0)
    return open_checkpoint(str(shutil.copytree(small_checkpoint, tmp_path / "sprint")))


def prefix_runs(checkpoint: Checkpoint, cache: Path, dtype: torch.dtype = torch.float32) -> tuple[bool, TextStage]:
    """Returns whether the instruction ran, which is longer than any other input here, and the stage."""
    lengths: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = text_stage.TextEncoder.__init__

        def count(self: object, body: torch.nn.Module, prefix: object, state: object = None) -> None:
            body.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
            forward(self, body, prefix, state)  # type: ignore[arg-type]

        patch.setattr(text_stage.TextEncoder, "__init__", count)
        stage = load_text_stage(checkpoint, dtype, CPU, cache)
    return bool(lengths), stage


def test_the_second_start_reads_what_the_first_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ran, first = prefix_runs(checkpoint, cache)
    ran_again, second = prefix_runs(checkpoint, cache)
    assert (ran, ran_again) == (True, False)
    prompts = ["a red circle", "blue"]
    for one, other in zip(first.encode(prompts), second.encode(prompts), strict=True):
        assert torch.equal(one.states, other.states)


def test_another_text_encoder_precision_or_a_damaged_file_runs_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert prefix_runs(checkpoint, cache)[0]
    assert prefix_runs(checkpoint, cache, torch.bfloat16)[0]
    (kept, _) = sorted((cache / "prefixes").iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    kept.write_bytes(kept.read_bytes()[:-100])
    assert prefix_runs(checkpoint, cache)[0]
    assert not prefix_runs(checkpoint, cache)[0]
    (weights,) = (tmp_path / "sprint" / "text_encoder").glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    assert prefix_runs(checkpoint, cache)[0]


def test_a_folder_that_cannot_be_written_is_no_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    ran, stage = prefix_runs(checkpoint, blocked)
    assert ran
    assert len(stage.encode(["a red circle"])) == 1


def test_a_quick_one_is_not_kept(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stage, "SLOW_PREFIX_S", 1e9)
    assert prefix_runs(checkpoint, tmp_path / "cache")[0]
    assert not (tmp_path / "cache").exists()
