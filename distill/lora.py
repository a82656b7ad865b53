"""A LoRA for the tiny checkpoint: trains it, writes it, and judges it.

    python -m distill.lora --model models/tiny --recipe tiny --out runs/lora    # writes runs/lora/ring.safetensors
    python -m distill.lora --model models/tiny --recipe tiny --judge models/lora/ring.safetensors

Shares of right pictures, each with the adapter and without it, of three kinds of held-out captions: "new" asks for one
thing of the new shape, "beside" for several or for one beside another thing, "old" is of the world as it was. The last
line is one JSON document.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from distill.evaluation.scores import Prompt, evaluation_prompts
from distill.recipes import RECIPES, Recipe
from distill.stages.lora import train, wider
from distill.training.checkpoint_writer import write_weights
from distill.world.captions import caption_of
from distill.world.judge import judge
from distill.world.scenes import CATEGORIES, World, sample_request
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine
from engines.types import AdapterOption, Engine, Job, Pixels

_SEED = 5_000_011  # of the pictures that are judged
_ATTEMPTS = 500  # to find a caption that was not asked yet
_ALONE = ("single_object", "colors")


def new_prompts(world: World, shape: str, count: int, categories: Sequence[str]) -> list[Prompt]:
    """Held-out captions, each another one, that name the shape; the categories in turn while they have any."""
    rng, found, texts = np.random.default_rng(0x10AA), list[Prompt](), set[str]()
    for index in range(_ATTEMPTS * count):
        category = categories[index % len(categories)]
        asked = sample_request(world, rng, category, "held_out")
        text = caption_of(asked, rng)
        if text not in texts and any(thing.shape == shape for thing in asked.things):
            texts.add(text)
            found.append(Prompt(text, category, asked))
        if len(found) == count:
            break
    return found


def right(
    engine: Engine, prompts: Sequence[Prompt], world: World, lora: tuple[tuple[str, float], ...]
) -> dict[str, float]:
    """Share of right one-step pictures: of all prompts, and by category."""
    verdicts: dict[str, list[bool]] = {}
    for prompt, pixels in zip(prompts, _pictures(engine, prompts, lora), strict=True):
        verdicts.setdefault(prompt.category, []).append(judge(pixels, prompt.asked, world).correct)
    everything = [verdict for some in verdicts.values() for verdict in some]
    shares = {name: sum(some) / len(some) for name, some in verdicts.items()}
    return {"all": sum(everything) / len(everything), **{name: round(share, 3) for name, share in shares.items()}}


def _pictures(engine: Engine, prompts: Sequence[Prompt], lora: tuple[tuple[str, float], ...]) -> Iterator[Pixels]:
    width, height = engine.limits.default_size
    jobs = [Job(prompt.text, _SEED + i, width, height, lora=lora) for i, prompt in enumerate(prompts)]
    for first in tqdm(range(0, len(jobs), engine.limits.max_batch), unit="batch", leave=False):
        for image in engine.generate(jobs[first : first + engine.limits.max_batch]):
            yield image.pixels


def report(model: str, recipe: Recipe, path: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of new and of old captions, with the adapter at `path` and without."""
    assert recipe.lora is not None
    shape, found = recipe.lora.shape, {}
    world = wider(recipe.world, shape)
    engine = load_engine(model, precision="fp32", lora=[AdapterOption(shape, str(path))])
    try:
        sets = {
            "new": new_prompts(world, shape, count, _ALONE),
            "beside": new_prompts(world, shape, count, [name for name in CATEGORIES if name not in _ALONE]),
            "old": evaluation_prompts(count, world=recipe.world),
        }
        for name, prompts in sets.items():
            seen = recipe.world if name == "old" else world
            found[name] = {
                "adapted": right(engine, prompts, seen, ((shape, 1.0),)),
                "base": right(engine, prompts, seen, ()),
            }
    finally:
        engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the one-step checkpoint")
    parser.add_argument(
        "--recipe", choices=sorted(name for name, make in RECIPES.items() if make().lora), required=True
    )
    parser.add_argument("--out", type=Path, help="run folder; the adapter is OUT/<shape>.safetensors")
    parser.add_argument("--judge", type=Path, help="an adapter that is there already, in place of training one")
    parser.add_argument(
        "--prompts", type=int, default=200, help="captions of each kind (default 200); 0 judges nothing"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.judge is None):
        parser.error("either --out, to train one, or --judge, to score one, is needed")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe, path = RECIPES[arguments.recipe](), arguments.judge
    assert recipe.lora is not None
    if path is None:
        weights = train(recipe.lora, recipe.world, open_checkpoint(arguments.model), arguments.out, Accelerator())
        path = arguments.out / f"{recipe.lora.shape}.safetensors"
        write_weights(path, weights, torch.bfloat16)
    if arguments.prompts:
        found = report(arguments.model, recipe, path, arguments.prompts)
        for kind, scores in found.items():
            print(f"{kind}: {scores['adapted']['all']:.1%} right with the adapter, {scores['base']['all']:.1%} without")
        print(json.dumps({"model": arguments.model, "prompts": arguments.prompts, **found}))


if __name__ == "__main__":
    main()
