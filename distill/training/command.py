"""The command line of a program that trains a small part of a checkpoint, or judges an existing one."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class TrainOrJudge:
    """The parsed command: exactly one of `out` and `judge` is set."""

    model: str
    recipe: Recipe
    out: Path | None  # folder of a run
    judge: Path | None  # an existing part
    prompts: int


def parse_command(
    documentation: str | None, part: str, has_stage: Callable[[Recipe], object], argv: Sequence[str] | None
) -> TrainOrJudge:
    """Parses the command line and sets the number of threads. Exits with code 2 for a bad one.

    part: "adapter, OUT/diamond.safetensors": its name and place. has_stage: whether a recipe can train it.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    name, _, place = part.partition(", ")
    recipes = sorted(name for name, make in RECIPES.items() if has_stage(make()))
    parser.add_argument("--model", required=True, help="the one-step checkpoint")
    parser.add_argument("--recipe", choices=recipes, required=True)
    parser.add_argument("--out", type=Path, help=f"run folder; the {name} is {place}")
    parser.add_argument("--judge", type=Path, help=f"an existing {name} to judge, in place of training one")
    parser.add_argument("--prompts", type=int, default=200, help="held-out captions (default 200); 0 judges nothing")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args(argv)
    if (arguments.out is None) == (arguments.judge is None):
        parser.error("either --out, to train one, or --judge, to score one, is needed")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]()
    return TrainOrJudge(arguments.model, recipe, arguments.out, arguments.judge, arguments.prompts)
