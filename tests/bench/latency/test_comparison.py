"""bench.latency: both sides make the same image from the same tensors, and the figures are correctly named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.harness.errors import BenchError
from bench.harness.memory import peak_rise
from bench.harness.pipelines import DiffusersPipeline, EnginePipeline, Workload, build_diffusers_pipeline
from bench.latency.__main__ import main
from bench.latency.comparison import PromptPool
from bench.latency.shared_weights import SharedWeights
from engines.checkpoints.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def test_a_run_against_diffusers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--model", str(folder), "--runs", "2", "--precision", "fp32", "--vs", "diffusers", "--tokens", "25"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parity_to_each_other"]["max_abs"] <= 1
    for name in ("ours", "theirs"):
        assert result[name]["parity_to_fp32"]["max_abs"] <= 1
        assert {stage["count"] for stage in result[name]["seconds"].values()} == {2}
        assert result[name]["rise_bytes"] >= 0
    medians = {name: result[name]["seconds"]["total"]["p50"] for name in ("ours", "theirs")}
    assert result["ratio"] == pytest.approx(medians["theirs"] / medians["ours"], rel=0.01)
    stages = result["theirs"]["seconds"]
    assert sum(stages[name]["mean"] for name in ("text", "denoise", "decode")) == pytest.approx(
        stages["total"]["mean"], abs=1e-5
    )
    assert result["prompt_tokens"]["mean"] == pytest.approx(25, abs=3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_both_make_the_same_images(folder: Path, steps: int) -> None:
    checkpoint = open_checkpoint(str(folder))
    task = Workload(["a red circle", "two blue squares on gray"], [3, 4], 64, 96, steps)
    ours = EnginePipeline(checkpoint, precision="fp32", device="cpu").run(task)
    theirs = DiffusersPipeline(checkpoint, "fp32", CPU, compiled=False).run(task)
    for first, second in zip(ours.images, theirs.images, strict=True):
        assert first.shape == second.shape == (96, 64, 3)
        assert abs(first.astype(int) - second).max() <= 1


def test_a_prompt_is_not_measured_twice(folder: Path) -> None:
    ours = EnginePipeline(open_checkpoint(str(folder)), precision="fp32", device="cpu")
    ours.run(Workload(["a red circle"], [1], 64, 64, 1))
    with pytest.raises(BenchError, match="twice"):
        ours.run(Workload(["A red circle "], [2], 64, 64, 1))


def test_prompts_are_of_the_length_asked_for_and_given_once(folder: Path) -> None:
    prompts = PromptPool(open_checkpoint(str(folder)), 18)
    prompts_taken = [*prompts.take(5), *prompts.take(5)]
    assert len(set(prompts_taken)) == 10
    assert all(abs(length - 18) <= 2 for length in prompts.used)
    with pytest.raises(BenchError, match="are needed"):
        prompts.take(10_000)


def test_two_pipelines_hold_the_same_tensors(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    weights = SharedWeights(checkpoint.weights, torch.bfloat16)
    shared = replace(checkpoint, weights=weights)
    ours, body = shared.load_transformer(torch.bfloat16, CPU), shared.load_text_body(torch.bfloat16, CPU)
    theirs = build_diffusers_pipeline(shared, torch.bfloat16, CPU)
    for first, second in ((ours, theirs.transformer), (body, theirs.text_encoder)):
        addresses = {key: tensor.data_ptr() for key, tensor in first.state_dict().items()}
        assert addresses == {key: tensor.data_ptr() for key, tensor in second.state_dict().items()}
    exact = shared.load_transformer(torch.float32, CPU)
    uncached = replace(checkpoint, weights=SharedWeights(checkpoint.weights, torch.bfloat16, keep=False))
    for first, second in zip(
        exact.parameters(), uncached.load_transformer(torch.float32, CPU).parameters(), strict=True
    ):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)
        assert torch.equal(first, first.to(torch.bfloat16).float())


def test_the_rise_sees_memory_that_is_freed_again() -> None:
    size = 64 * 2**20
    with peak_rise(CPU) as risen:
        torch.ones(size, dtype=torch.uint8).sum()
    assert risen[0] > size // 2


@pytest.mark.gpu
def test_a_run_on_the_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model", str(folder), "--runs", "2", "--vs", "diffusers", "--memory", "--device", "cuda"]
    assert main(line) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ours"]["rise_bytes"] > 0
    assert result["peak_bytes"]["ours"] > 0
    assert result["ours"]["backend"] == "cuda-graph"
