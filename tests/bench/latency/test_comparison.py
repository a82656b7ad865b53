"""bench.latency: both sides make the same picture from the same tensors, and the figures are what they are called."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.harness.errors import BenchError
from bench.harness.memory import rise
from bench.harness.pipelines import Diffusers, Ours, Task, pipeline
from bench.latency.__main__ import main
from bench.latency.comparison import Prompts
from bench.latency.shared_weights import SharedWeights
from engines.checkpoints.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def test_a_run_against_diffusers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--model", str(folder), "--runs", "2", "--precision", "fp32", "--vs", "diffusers", "--tokens", "25"]) == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parity_to_each_other"]["max_abs"] <= 1
    for name in ("ours", "theirs"):
        assert found[name]["parity_to_fp32"]["max_abs"] <= 1
        assert {stage["count"] for stage in found[name]["seconds"].values()} == {2}
        assert found[name]["rise_bytes"] >= 0
    medians = {name: found[name]["seconds"]["total"]["p50"] for name in ("ours", "theirs")}
    assert found["ratio"] == pytest.approx(medians["theirs"] / medians["ours"], rel=0.01)
    stages = found["theirs"]["seconds"]
    assert sum(stages[name]["mean"] for name in ("text", "denoise", "decode")) == pytest.approx(
        stages["total"]["mean"], abs=1e-5
    )
    assert found["prompt_tokens"]["mean"] == pytest.approx(25, abs=3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_both_make_the_same_pictures(folder: Path, steps: int) -> None:
    checkpoint = open_checkpoint(str(folder))
    task = Task(["a red circle", "two blue squares on gray"], [3, 4], 64, 96, steps)
    ours = Ours(checkpoint, precision="fp32", device="cpu").run(task)
    theirs = Diffusers(checkpoint, "fp32", CPU, compiled=False).run(task)
    for one, other in zip(ours.pictures, theirs.pictures, strict=True):
        assert one.shape == other.shape == (96, 64, 3)
        assert abs(one.astype(int) - other).max() <= 1


def test_a_prompt_is_not_measured_twice(folder: Path) -> None:
    ours = Ours(open_checkpoint(str(folder)), precision="fp32", device="cpu")
    ours.run(Task(["a red circle"], [1], 64, 64, 1))
    with pytest.raises(BenchError, match="twice"):
        ours.run(Task(["A red circle "], [2], 64, 64, 1))


def test_prompts_are_of_the_length_asked_for_and_given_once(folder: Path) -> None:
    prompts = Prompts(open_checkpoint(str(folder)), 18)
    taken = [*prompts.take(5), *prompts.take(5)]
    assert len(set(taken)) == 10
    assert all(abs(length - 18) <= 2 for length in prompts.used)
    with pytest.raises(BenchError, match="are needed"):
        prompts.take(10_000)


def test_two_pipelines_hold_the_same_tensors(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    weights = SharedWeights(checkpoint.weights, torch.bfloat16)
    shared = replace(checkpoint, weights=weights)
    ours, body = shared.load_transformer(torch.bfloat16, CPU), shared.load_text_body(torch.bfloat16, CPU)
    theirs = pipeline(shared, torch.bfloat16, CPU)
    for one, other in ((ours, theirs.transformer), (body, theirs.text_encoder)):
        places = {key: tensor.data_ptr() for key, tensor in one.state_dict().items()}
        assert places == {key: tensor.data_ptr() for key, tensor in other.state_dict().items()}
    exact = shared.load_transformer(torch.float32, CPU)
    alone = replace(checkpoint, weights=SharedWeights(checkpoint.weights, torch.bfloat16, keep=False))
    for one, other in zip(exact.parameters(), alone.load_transformer(torch.float32, CPU).parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
        assert torch.equal(one, one.to(torch.bfloat16).float())


def test_the_rise_sees_memory_that_is_freed_again() -> None:
    size = 64 * 2**20
    with rise(CPU) as risen:
        torch.ones(size, dtype=torch.uint8).sum()
    assert risen[0] > size // 2


@pytest.mark.gpu
def test_a_run_on_the_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model", str(folder), "--runs", "2", "--vs", "diffusers", "--memory", "--device", "cuda"]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ours"]["rise_bytes"] > 0
    assert found["peak_bytes"]["ours"] > 0
    assert found["ours"]["backend"] == "cuda-graph"
