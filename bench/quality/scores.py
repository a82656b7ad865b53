"""Scores, distances and latency of each variant of a checkpoint, paired with the first variant's."""

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from bench.harness.host import host_facts
from bench.harness.summary import table
from bench.quality.intervals import grouped_interval, ratio_interval
from bench.quality.variants import Generators, Variant, open_variant
from bench.quality.worst_images import ImagePair, write_sheet
from distill.evaluation.scores import SEED_STRIDE, Generate, Prompt, evaluation_prompts
from distill.world.judge import judge
from engines.checkpoints.checkpoint import open_checkpoint
from engines.sampler import Schedule, angles_for
from engines.types import Pixels

WORST = 4  # images of a row that the sheet shows


@dataclass(frozen=True, slots=True)
class Run:
    """Images of all prompts and seeds, prompt by prompt, and whether each is correct."""

    images: list[Pixels]
    correct: list[float]


@dataclass
class Comparison:
    """The prompts, and the first variant's images by number of steps."""

    options: argparse.Namespace
    prompts: list[Prompt]
    first: dict[int, Run]
    weights: str = ""  # sha256, in the names of kept images

    def run(self, generate: Generate, name: str) -> Run:
        """Makes the images of a row, or reads them if they were kept, and judges them. name: of the row."""
        path = self._kept(name)
        if path is not None and path.exists():
            images = list(np.load(path)["images"])
        else:
            images = [image for seed in range(self.options.seeds) for image in self._generated(generate, seed)]
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part.npz")
                np.savez_compressed(part, images=np.stack(images))
                part.replace(path)
        prompts = self.prompts * self.options.seeds
        correct = [float(judge(x, p.requirement).correct) for p, x in zip(prompts, images, strict=True)]
        return Run(images, correct)

    def _generated(self, generate: Generate, seed: int) -> list[Pixels]:
        seeds = [seed * SEED_STRIDE + at for at in range(len(self.prompts))]
        return list(generate([prompt.text for prompt in self.prompts], seeds))

    def _kept(self, name: str) -> Path | None:
        """Returns where the images of a row are kept; its name stands for weights and settings too."""
        options = self.options
        if options.keep is None:
            return None
        settings = (name, self.weights, options.prompts, options.seeds, options.guidance, options.size)
        return Path(options.keep) / f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.npz"

    def by_category(self, values: Sequence[float]) -> dict[str, list[float]]:
        """Returns category -> one value per prompt, the mean over its seeds."""
        result: dict[str, list[float]] = {}
        count = len(self.prompts)
        for at, prompt in enumerate(self.prompts):
            result.setdefault(prompt.category, []).append(fmean(values[at::count]))
        return result

    def row(self, variant: Variant, steps: int, schedule: Schedule, run: Run) -> dict[str, Any]:
        first = self.first[steps]
        categories = self.by_category(run.correct)
        by_seed = [self.by_category(self._of_seed(run.correct, seed)) for seed in range(self.options.seeds)]
        means = [fmean(map(fmean, result.values())) for result in by_seed]
        apart = [one - other for one, other in zip(run.correct, first.correct, strict=True)]
        errors = [_mean_square(a, b) for a, b in zip(first.images, run.images, strict=True)]
        return {
            "variant": str(variant),
            "steps": steps,
            "schedule": schedule,
            "mean": round(fmean(map(fmean, categories.values())), 4),
            "spread": round(stdev(means), 4) if len(means) > 1 else 0.0,
            "interval": list(grouped_interval(categories))[1:],
            "apart": list(grouped_interval(self.by_category(apart))),
            "changed": sum(bool(value) for value in apart),
            "categories": {name: round(fmean(values), 4) for name, values in categories.items()},
            "psnr_db": _psnr(fmean(errors)),
            "worst_psnr_db": _psnr(max(errors)),
            "max_abs": max(_largest(a, b) for a, b in zip(first.images, run.images, strict=True)),
        }

    def _of_seed(self, values: Sequence[float], seed: int) -> Sequence[float]:
        count = len(self.prompts)
        return values[seed * count : (seed + 1) * count]

    def worst(self, name: str, steps: int, run: Run) -> list[ImagePair]:
        """Returns the images furthest from the first variant's."""
        first = self.first[steps]
        errors = [_mean_square(a, b) for a, b in zip(first.images, run.images, strict=True)]
        order = sorted(range(len(errors)), key=errors.__getitem__, reverse=True)[:WORST]
        texts = [self.prompts[at % len(self.prompts)].text for at in order]
        return [
            ImagePair(name, text, _psnr(errors[at]), first.images[at], run.images[at])
            for text, at in zip(texts, order, strict=True)
        ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document."""
    weights = open_checkpoint(options.model).weights.sha256() if options.keep else ""
    comparison = Comparison(options, evaluation_prompts(options.prompts), {}, weights)
    rows: list[dict[str, Any]] = []
    pairs: list[ImagePair] = []
    with open_variant(options.variants[0], options) as reference:
        for variant in options.variants:
            if variant is options.variants[0]:
                _rows(variant, reference, reference, comparison, rows, pairs)
                continue
            with open_variant(variant, options) as generators:
                _rows(variant, generators, reference, comparison, rows, pairs)
    if options.worst is not None:
        write_sheet(pairs, options.worst)
    return {
        "program": "bench.quality",
        "command": options.command,
        "model": options.model,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "guidance": options.guidance,
        "schedule": ",".join(options.schedule),
        "compared_with": str(options.variants[0]),
        "latency_runs": options.latency_runs,
        "worst": None if options.worst is None else options.worst.name,
        "machine": host_facts(),
        "rows": rows,
    }


def _rows(
    variant: Variant,
    generators: Generators,
    reference: Generators,
    comparison: Comparison,
    rows: list[dict[str, Any]],
    pairs: list[ImagePair],
) -> None:
    """Adds a row for each number of steps and schedule; a schedule with the same angles is skipped."""
    options = comparison.options
    for steps in options.steps:
        for schedule in options.schedule:
            if schedule != options.schedule[0] and angles_for(steps, schedule) == angles_for(
                steps, options.schedule[0]
            ):
                continue
            generate = generators(steps, schedule)
            run = comparison.run(generate, f"{variant}, {steps}, {schedule}")
            comparison.first.setdefault(steps, run)
            row = comparison.row(variant, steps, schedule, run)
            rows.append(row | _latency(variant, generate, reference(steps, options.schedule[0]), comparison))
            if run is not comparison.first[steps] and steps == options.steps[0]:
                pairs += comparison.worst(f"{variant}, {schedule}", steps, run)


def _latency(variant: Variant, generate: Generate, reference: Generate, comparison: Comparison) -> dict[str, Any]:
    """Returns seconds of one image of a known prompt, and their ratio to the first variant's, run in turn."""
    runs = comparison.options.latency_runs
    if not runs or variant.emulated:
        return {"seconds": None, "ratio": None}
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        prompt = comparison.prompts[number % len(comparison.prompts)].text
        for timings, run_one in zip(seconds, (reference, generate), strict=True):
            began = time.perf_counter()
            list(run_one([prompt], [number]))
            if number:  # the first warms both
                timings.append(time.perf_counter() - began)
    return {"seconds": round(median(seconds[1]), 5), "ratio": list(ratio_interval(*seconds))}


def _mean_square(one: Pixels, other: Pixels) -> float:
    return float(np.square(one.astype(np.float32) - other).mean())


def _largest(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(np.int16) - other).max())


def _psnr(error: float) -> float | None:
    return round(float(10 * np.log10(255**2 / error)), 2) if error else None


def show(result: dict[str, Any]) -> str:
    """Returns the tables for people."""
    head = ("variant", "steps", "schedule", "score", "95 %", "apart from the first", "95 %", "changed")
    last = ("PSNR, dB", "worst, dB", "max abs")
    timed = ("seconds", "times the first's", "95 %") if result["latency_runs"] else ()
    rows = [
        [
            *(row[name] for name in ("variant", "steps", "schedule", "mean")),
            _bounds(row["interval"]),
            f"{row['apart'][0]:+.4f}",
            _bounds(row["apart"][1:], "+.3f"),
            row["changed"],
            *(row[name] for name in ("psnr_db", "worst_psnr_db", "max_abs")),
            *(_timings(row) if timed else ()),
        ]
        for row in result["rows"]
    ]
    names = list(result["rows"][0]["categories"])
    each = [[row["variant"], row["steps"], row["schedule"], *row["categories"].values()] for row in result["rows"]]
    return "\n\n".join([table((*head, *last, *timed), rows), table(("variant", "steps", "schedule", *names), each)])


def _timings(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["seconds"], row["ratio"] and row["ratio"][0], row["ratio"] and _bounds(row["ratio"][1:])


def _bounds(bounds: Sequence[float], form: str = ".3f") -> str:
    low, high = (format(bound, form) for bound in bounds)
    return f"{low} to {high}"
