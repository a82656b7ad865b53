"""Scores and distances of each variant of a checkpoint."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.harness.pipelines import DTYPES, Diffusers, Task
from bench.harness.summary import table
from distill.evaluation.scores import Generate, engine_generator, evaluate, evaluation_prompts
from engines.backends.parity import Difference, difference
from engines.checkpoints.checkpoint import open_checkpoint
from engines.loader import load_engine
from engines.types import Pixels


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the checkpoint: `backend` with `precision`, or what stands behind `engine:`."""

    backend: str
    argument: str

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Raises ValueError for text without two parts."""
        backend, _, argument = text.partition(":")
        if not backend or not argument:
            raise ValueError(text)
        return cls(backend, argument)

    def __str__(self) -> str:
        return f"{self.backend}:{self.argument}"


class Kept:
    """A generator whose pictures are kept as they pass by."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self.pictures: list[Pixels] = []

    def __call__(self, texts: list[str], seeds: list[int]) -> Iterator[Pixels]:
        for picture in self._generate(texts, seeds):
            self.pictures.append(picture)
            yield picture


def generators(variant: Variant, options: argparse.Namespace) -> Iterator[tuple[int, Generate]]:
    """A generator for every number of steps, all on one loaded checkpoint; let go of one before asking for the next."""
    if variant.backend == "diffusers":
        if variant.argument not in DTYPES:
            raise BenchError(f"variants: got {variant}, diffusers runs in {', '.join(DTYPES)}")
        checkpoint = open_checkpoint(options.model)
        rival = Diffusers(checkpoint, variant.argument, torch.device("cpu"), guidance=options.guidance)
        size = options.size or checkpoint.settings.default_size[0]
        for steps in options.steps:
            yield steps, _of_diffusers(rival, size, steps, options.max_batch)
        return
    built = variant.backend == "engine"
    engine = load_engine(
        options.model,
        engine_dir=variant.argument if built else None,
        backend="auto" if built else variant.backend,
        precision=None if built else variant.argument,
        max_batch=options.max_batch,
        schedule=options.schedule,
    )
    try:
        for steps in options.steps:
            yield steps, engine_generator(engine, steps, options.guidance, options.size)
    finally:
        engine.close()


def _of_diffusers(rival: Diffusers, size: int, steps: int, batch: int) -> Generate:
    def generate(texts: list[str], seeds: list[int]) -> Iterator[Pixels]:
        for first in range(0, len(texts), batch):
            some = slice(first, first + batch)
            yield from rival.run(Task(texts[some], seeds[some], size, size, steps)).pictures

    return generate


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON document."""
    prompts = evaluation_prompts(options.prompts)
    reference: dict[int, list[Pixels]] = {}
    rows: list[dict[str, Any]] = []
    for variant in options.variants:
        for steps, generate in generators(variant, options):
            kept = Kept(generate)
            report = evaluate(kept, prompts, range(options.seeds))
            far = _difference(reference.setdefault(steps, kept.pictures), kept.pictures)
            rows.append(
                {
                    "variant": str(variant),
                    "steps": steps,
                    "mean": round(report.mean, 4),
                    "spread": round(report.spread, 4),
                    "categories": {name: round(score, 4) for name, score in report.categories.items()},
                    "psnr_db": None if far.psnr_db is None else round(far.psnr_db, 2),
                    "max_abs": far.max_abs,
                }
            )
    return {
        "program": "bench.quality",
        "command": options.command,
        "model": options.model,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "guidance": options.guidance,
        "schedule": options.schedule,
        "compared_with": str(options.variants[0]),
        "machine": machine(),
        "rows": rows,
    }


def _difference(expected: Sequence[Pixels], got: Sequence[Pixels]) -> Difference:
    return difference(torch.from_numpy(np.stack(expected)), torch.from_numpy(np.stack(got)))


def show(found: dict[str, Any]) -> str:
    """The table for people."""
    names = list(found["rows"][0]["categories"])
    first, last = ("variant", "steps", "mean", "spread"), ("psnr_db", "max_abs")
    rows = [[*map(row.get, first), *row["categories"].values(), *map(row.get, last)] for row in found["rows"]]
    far = f"PSNR to {found['compared_with']}, dB"
    return table(["variant", "steps", "mean", "std over seeds", *names, far, "max abs"], rows)
