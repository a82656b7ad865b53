"""Trains, writes and judges a small decoder (TAESANA's architecture) for the tiny checkpoint.

    python -m distill.decoder --model models/tiny --recipe tiny --out runs/decoder    # writes runs/decoder/taesana/
    python -m distill.decoder --model models/tiny --recipe tiny --judge models/tiny/taesana

Prints the shares of right one-step images, with the small decoder and with the checkpoint's own, over the same held-out
captions. The last line is one JSON document.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluation.scores import engine_generator, evaluate, evaluation_prompts
from distill.recipes import RECIPES
from distill.stages.small_decoder import train
from distill.training.checkpoint_writer import write_json, write_weights
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine

GUIDANCE = 4.5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the one-step checkpoint")
    recipes = sorted(name for name, make in RECIPES.items() if make().small_decoder)
    parser.add_argument("--recipe", choices=recipes, required=True)
    parser.add_argument("--out", type=Path, help="run folder; the decoder is OUT/taesana")
    parser.add_argument("--judge", type=Path, help="an existing decoder to judge, in place of training one")
    parser.add_argument("--prompts", type=int, default=200, help="held-out captions (default 200); 0 judges nothing")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args(argv)
    if (arguments.out is None) == (arguments.judge is None):
        parser.error("either --out, to train one, or --judge, to score one, is needed")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe, folder = RECIPES[arguments.recipe](), arguments.judge
    assert recipe.small_decoder is not None
    if folder is None:
        folder = arguments.out / "taesana"
        checkpoint = open_checkpoint(arguments.model)
        decoder = train(recipe.small_decoder, recipe.world, checkpoint, arguments.out, Accelerator())
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / "diffusion_pytorch_model.safetensors", decoder.state_dict(), torch.bfloat16)
        write_json(folder / "config.json", recipe.small_decoder.architecture.to_dict())
    if arguments.prompts:
        shares = {name: _share(arguments.model, name, arguments.prompts) for name in (str(folder), "full")}
        small, full = shares.values()
        print(f"{small:.1%} right with the small decoder, {full:.1%} with the checkpoint's own")
        print(json.dumps({"model": arguments.model, "prompts": arguments.prompts, "small": small, "full": full}))


def _share(model: str, decoder: str, prompts: int) -> float:
    """Returns the share of right one-step images."""
    engine = load_engine(model, precision="fp32", decoder=decoder)
    try:
        return evaluate(engine_generator(engine, 1, GUIDANCE), evaluation_prompts(prompts)).mean
    finally:
        engine.close()


if __name__ == "__main__":
    main()
