"""The LoRA stage, run small, and what ships of it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.evaluation.scores import Prompt
from distill.lora import new_prompts, right
from distill.recipes import smoke
from distill.stages.lora import Additions, scenes, still, train, wider
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
ALONE = ("single_object", "colors")


def test_the_judge_tells_a_ring_from_all_else() -> None:
    world = wider(World(), "ring")
    for scene in scenes(still(world), "ring", 24, 0):
        assert judge(render(world, scene, 256), scene.asked, world).correct


def test_prompts_of_the_shape_are_held_out_and_differ() -> None:
    prompts = new_prompts(wider(World(), "ring"), "ring", 40, ALONE)
    assert len({prompt.text for prompt in prompts}) == 40
    assert all(prompt.asked.things[0].shape == "ring" for prompt in prompts)


def test_additions_begin_as_nothing_and_what_is_written_is_read(tmp_path: Path) -> None:
    numbers = smoke().lora
    assert numbers is not None
    checkpoint = open_checkpoint(str(ROOT / "models" / "tiny"))
    plain = checkpoint.load_transformer(torch.float32, torch.device("cpu"))
    added = checkpoint.load_transformer(torch.float32, torch.device("cpu"))
    additions = Additions(added, numbers.rank)
    name = additions.names[0]
    assert torch.equal(plain.get_submodule(name).weight, added.get_submodule(name).weight)
    weights = train(numbers, World(), checkpoint, tmp_path, Accelerator())
    write_weights(tmp_path / "a.safetensors", weights, torch.float32)
    (adapter,) = read_adapters([AdapterOption("a", str(tmp_path / "a.safetensors"))], checkpoint)
    assert set(adapter.factors) == set(additions.names)
    assert any(bool(factors.up.any()) for factors in adapter.factors.values())


@pytest.mark.slow
def test_the_shipped_one_draws_rings_and_leaves_the_rest() -> None:
    """Fewer captions than `python -m distill.lora --judge` takes."""
    world = wider(World(), "ring")
    engine = load_engine(str(ROOT / "models" / "tiny"), precision="fp32", lora=[AdapterOption("ring", str(SHIPPED))])
    prompts: list[Prompt] = new_prompts(world, "ring", 40, ALONE)
    assert right(engine, prompts, world, RING)["all"] >= 0.4
    assert right(engine, prompts, world, ())["all"] <= 0.05
    engine.close()
