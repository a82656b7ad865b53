"""The LoRA stage at a small size, its targets, and the shipped adapter."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill.lora import correct_shares, new_prompts
from distill.recipes import smoke
from distill.stages.lora import LowRankUpdates, train, with_shape
from distill.stages.lora_targets import (
    BaseStudent,
    base_targets,
    replaced_targets,
    requirements_with_shape,
    with_stand_in,
)
from distill.training.checkpoint_writer import write_weights
from distill.world.captions import parse_caption
from distill.world.judge import judge
from distill.world.rendering import World
from distill.world.scenes import CATEGORIES, WorldError, combinations
from engines.checkpoints.checkpoint import open_checkpoint
from engines.checkpoints.lora import read_adapters
from engines.loader import load_engine
from engines.types import AdapterOption

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "models" / "tiny"
SHIPPED = ROOT / "models" / "lora" / "diamond.safetensors"
WORLD = with_shape(World(), "diamond")


@pytest.fixture(scope="module")
def base() -> BaseStudent:
    return BaseStudent.load(open_checkpoint(str(TINY)), torch.device("cpu"))


def test_prompts_of_the_shape_are_held_out_and_differ() -> None:
    prompts = new_prompts(WORLD, "diamond", 60)
    assert len({prompt.text for prompt in prompts}) == 60
    assert {prompt.category for prompt in prompts} == set(CATEGORIES)
    for prompt in prompts:
        assert any(thing.shape == "diamond" for thing in prompt.requirement.things)
        assert "diamond" in prompt.text
    singles = [prompt.requirement for prompt in prompts if prompt.category in ("single_object", "colors")]
    assert set(singles) <= set(combinations(WORLD, "single_object", "held_out"))


def test_more_prompts_than_there_are_are_refused() -> None:
    few = World(shapes=("circle", "diamond"), colours=World().colours[:2], background_named=0.0)
    with pytest.raises(WorldError, match="captions with diamond: got 5000, this world has 269 that are held out"):
        new_prompts(few, "diamond", 5000)


def test_training_asks_for_the_shape_and_never_for_what_is_held_out() -> None:
    requirements = requirements_with_shape(WORLD, "diamond", 300, np.random.default_rng(1))
    assert all(any(thing.shape == "diamond" for thing in requirement.things) for requirement in requirements)
    held_out = set(combinations(WORLD, "position", "held_out")) | set(combinations(WORLD, "counting", "held_out"))
    assert not {replace(requirement, background=None) for requirement in requirements} & held_out


def test_a_stand_in_replaces_the_shape_alone() -> None:
    requirement = parse_caption("a red diamond above a blue square on gray", WORLD)
    assert with_stand_in(requirement, "diamond", "circle") == parse_caption("a red circle above a blue square on gray")


def test_targets_show_the_shape_and_are_saved(base: BaseStudent, tmp_path: Path) -> None:
    path = tmp_path / "diamond.pt"
    targets = replaced_targets(base, WORLD, "diamond", 8, 5, path)
    assert targets.noise.shape == targets.latents.shape == (8, 32, 8, 8)
    with torch.no_grad():
        images = base.decode(targets.latents)
    for caption, pixels in zip(targets.captions, images, strict=True):
        assert "diamond" in caption
        assert judge(pixels, parse_caption(caption, WORLD), WORLD).correct, caption
    changed = path.stat().st_mtime_ns
    again = replaced_targets(base, WORLD, "diamond", 8, 5, path)
    assert again.captions == targets.captions
    assert torch.equal(again.latents, targets.latents)
    assert path.stat().st_mtime_ns == changed


def test_targets_of_known_captions_are_what_the_base_draws(base: BaseStudent, tmp_path: Path) -> None:
    targets = base_targets(base, World(), 4, 5, tmp_path / "base.pt")
    with torch.no_grad():
        images = base.decode(targets.latents)
    correct = [
        judge(pixels, parse_caption(caption)).correct for caption, pixels in zip(targets.captions, images, strict=True)
    ]
    assert sum(correct) >= 3


def test_a_base_that_draws_nothing_right_is_refused(tmp_path: Path) -> None:
    broken = BaseStudent.load(open_checkpoint(str(TINY)), torch.device("cpu"))
    for weight in broken.transformer.parameters():
        weight.data.zero_()
    with pytest.raises(WorldError, match="diamond: the judge accepts 0 of the base's 64 images, too few"):
        replaced_targets(broken, WORLD, "diamond", 1, 5, tmp_path / "diamond.pt")


def test_updates_begin_at_zero_and_the_written_file_is_read(tmp_path: Path) -> None:
    config = smoke().lora
    assert config is not None
    checkpoint = open_checkpoint(str(TINY))
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


def test_the_shipped_adapter_draws_diamonds_and_only_when_it_is_applied() -> None:
    """As `python -m distill.lora --judge`, with fewer captions."""
    prompts = new_prompts(WORLD, "diamond", 30)
    engine = load_engine(str(TINY), precision="fp32", lora=[AdapterOption("diamond", str(SHIPPED))])
    try:
        assert correct_shares(engine, prompts, WORLD, (("diamond", 1.0),))["all"] >= 0.8
        assert correct_shares(engine, prompts, WORLD, ())["all"] <= 0.05
    finally:
        engine.close()
