"""Trains, writes and judges a LoRA for the tiny checkpoint.

    python -m distill.lora --model models/tiny --recipe tiny --out runs/lora    # writes runs/lora/diamond.safetensors
    python -m distill.lora --model models/tiny --recipe tiny --judge models/lora/diamond.safetensors

Prints the shares of right images, with the adapter and without it, for two kinds of held-out captions, of all six
categories in turn. "new" names the new shape, "old" only the base model's. The last line is one JSON document.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from distill.evaluation.scores import Prompt, evaluation_prompts, run_jobs
from distill.recipes import Recipe
from distill.stages.lora import train, with_shape
from distill.training.checkpoint_writer import write_weights
from distill.training.command import parse_command
from distill.world.captions import caption_of
from distill.world.judge import judge
from distill.world.scenes import CATEGORIES, World, WorldError, sample_request
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine
from engines.types import AdapterOption, Engine, Job

_SEED = 5_000_011  # of the first judged image
_ATTEMPTS = 500  # to draw a new caption


def new_prompts(world: World, shape: str, count: int) -> list[Prompt]:
    """Draws different held-out captions that name the shape, the six categories in turn while they have any.

    Raises WorldError if there are fewer than `count`.
    """
    rng, prompts, texts = np.random.default_rng(0x10AA), list[Prompt](), set[str]()
    categories = list(CATEGORIES)
    while len(prompts) < count:
        if not categories:
            raise WorldError(f"captions with {shape}: got {count}, this world has {len(prompts)} that are held out")
        category = categories.pop(0)
        for _ in range(_ATTEMPTS):
            requirement = sample_request(world, rng, category, "held_out")
            text = caption_of(requirement, rng)
            if text not in texts and any(thing.shape == shape for thing in requirement.things):
                texts.add(text)
                prompts.append(Prompt(text, category, requirement))
                categories.append(category)
                break
    return prompts


def correct_shares(
    engine: Engine, prompts: Sequence[Prompt], world: World, lora: tuple[tuple[str, float], ...]
) -> dict[str, float]:
    """Returns the share of right one-step images over all prompts, and by category."""
    width, height = engine.limits.default_size
    jobs = [Job(prompt.text, _SEED + i, width, height, lora=lora) for i, prompt in enumerate(prompts)]
    verdicts: dict[str, list[bool]] = {}
    for prompt, pixels in zip(prompts, run_jobs(engine, jobs), strict=True):
        verdicts.setdefault(prompt.category, []).append(judge(pixels, prompt.requirement, world).correct)
    shares = {name: round(sum(group) / len(group), 3) for name, group in verdicts.items()}
    return {"all": sum(sum(group) for group in verdicts.values()) / len(prompts), **shares}


def evaluate_adapter(model: str, recipe: Recipe, path: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Scores each kind of captions with the adapter at `path` and without it."""
    assert recipe.lora is not None
    shape, scores = recipe.lora.shape, {}
    world = with_shape(recipe.world, shape)
    engine = load_engine(model, precision="fp32", lora=[AdapterOption(shape, str(path))])
    try:
        sets = {
            "new": new_prompts(world, shape, count),
            "old": evaluation_prompts(count, world=recipe.world),
        }
        for name, prompts in sets.items():
            judged = recipe.world if name == "old" else world
            scores[name] = {
                "adapted": correct_shares(engine, prompts, judged, ((shape, 1.0),)),
                "base": correct_shares(engine, prompts, judged, ()),
            }
    finally:
        engine.close()
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    command = parse_command(__doc__, "adapter, OUT/<shape>.safetensors", lambda recipe: recipe.lora, argv)
    recipe, path = command.recipe, command.judge
    assert recipe.lora is not None
    if path is None:
        assert command.out is not None
        weights = train(recipe.lora, recipe.world, open_checkpoint(command.model), command.out, Accelerator())
        path = command.out / f"{recipe.lora.shape}.safetensors"
        write_weights(path, weights, torch.bfloat16)
    if command.prompts:
        scores = evaluate_adapter(command.model, recipe, path, command.prompts)
        for kind, shares in scores.items():
            print(f"{kind}: {shares['adapted']['all']:.1%} right with the adapter, {shares['base']['all']:.1%} without")
        print(json.dumps({"model": command.model, "prompts": command.prompts, **scores}))


if __name__ == "__main__":
    main()
