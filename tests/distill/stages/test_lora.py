"""The LoRA stage at a small size, and the shipped adapter."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.evaluation.scores import Prompt
from distill.lora import correct_shares, new_prompts
from distill.recipes import smoke
from distill.stages.lora import LowRankUpdates, scenes_with_shape, train, with_shape, without_jitter
from distill.training.checkpoint_writer import write_weights
from distill.world.judge import judge
from distill.world.rendering import World, render
from engines.checkpoints.checkpoint import open_checkpoint
from engines.checkpoints.lora import read_adapters
from engines.loader import load_engine
from engines.types import AdapterOption

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "models" / "lora" / "ring.safetensors"
RING = (("ring", 1.0),)
SINGLE = ("single_object", "colors")


def test_the_judge_tells_a_ring_from_all_else() -> None:
    world = with_shape(World(), "ring")
    for scene in scenes_with_shape(without_jitter(world), "ring", 24, 0):
        assert judge(render(world, scene, 256), scene.requirement, world).correct


def test_prompts_of_the_shape_are_held_out_and_differ() -> None:
    prompts = new_prompts(with_shape(World(), "ring"), "ring", 40, SINGLE)
    assert len({prompt.text for prompt in prompts}) == 40
    assert all(prompt.requirement.things[0].shape == "ring" for prompt in prompts)


def test_updates_begin_at_zero_and_the_written_file_is_read(tmp_path: Path) -> None:
    config = smoke().lora
    assert config is not None
    checkpoint = open_checkpoint(str(ROOT / "models" / "tiny"))
    plain = checkpoint.load_transformer(torch.float32, torch.device("cpu"))
    updated = checkpoint.load_transformer(torch.float32, torch.device("cpu"))
    updates = LowRankUpdates(updated, config.rank)
    name = updates.names[0]
    assert torch.equal(plain.get_submodule(name).weight, updated.get_submodule(name).weight)
    weights = train(config, World(), checkpoint, tmp_path, Accelerator())
    write_weights(tmp_path / "a.safetensors", weights, torch.float32)
    (adapter,) = read_adapters([AdapterOption("a", str(tmp_path / "a.safetensors"))], checkpoint)
    assert set(adapter.factors) == set(updates.names)
    assert any(bool(factors.up.any()) for factors in adapter.factors.values())


@pytest.mark.slow
def test_the_shipped_adapter_draws_rings_only_when_it_is_applied() -> None:
    """As `python -m distill.lora --judge`, with fewer captions."""
    world = with_shape(World(), "ring")
    engine = load_engine(str(ROOT / "models" / "tiny"), precision="fp32", lora=[AdapterOption("ring", str(SHIPPED))])
    prompts: list[Prompt] = new_prompts(world, "ring", 40, SINGLE)
    assert correct_shares(engine, prompts, world, RING)["all"] >= 0.4
    assert correct_shares(engine, prompts, world, ())["all"] <= 0.05
    engine.close()
