"""Scores how often images follow their drawing, and how often they would without it.

    python -m distill.evaluation.control_adherence --model models/tiny --cases 200        # last line: one JSON document

Each case is a held-out caption of one thing, a random position and size, and a shaky sketch of the thing's outline. An
image follows its drawing if the pixels of the caption's colour overlap the thing's true mask by at least 0.7
(intersection over union). It is right if the judge also sees that thing and nothing else.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from distill.evaluation.scores import run_jobs
from distill.stages.controlnet import control_world
from distill.world.captions import caption_of
from distill.world.judge import MAX_COLOUR_DISTANCE, judge
from distill.world.rendering import Scene, World, coverage, sample_scene
from distill.world.shape_matching import Mask
from distill.world.sketches import draw_sketch
from engines.types import Engine, Job, Pixels

MIN_OVERLAP = 0.7
FIRST_CASE_SEED = 2**40  # far from the seeds of training


@dataclass(frozen=True)
class Case:
    """One thing to draw: its scene, a caption, and the drawing [H,W,3]."""

    scene: Scene
    caption: str
    drawing: Pixels


@dataclass(frozen=True)
class Score:
    """Shares of the cases, 0 to 1, and the median overlap."""

    follows: float
    right: float
    median_overlap: float


def cases(count: int, size: int) -> list[Case]:
    """Draws cases unseen in training: captions of the held-out split, sketches of other seeds."""
    world = control_world(World())
    drawn = []
    for number in range(count):
        rng = np.random.default_rng((FIRST_CASE_SEED, number))
        scene = sample_scene(world, rng, "single_object", "held_out")
        drawn.append(Case(scene, caption_of(scene.requirement, rng), draw_sketch(scene, size, rng)))
    return drawn


def overlap(pixels: Pixels, scene: Scene) -> float:
    """Returns the intersection over union of the scene's one thing and the image's pixels in its colour."""
    (thing,) = scene.things
    height, width = pixels.shape[:2]
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5 - thing.x * width))[None, :]
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - thing.y * height))[:, None]
    expected: Mask = coverage(thing.shape, x, y, thing.size * width, thing.angle) > 0.5
    distance = np.linalg.norm(pixels.astype(np.float32) - np.array(World().rgb(thing.colour), np.float32), axis=2)
    seen: Mask = distance < MAX_COLOUR_DISTANCE
    return float((expected & seen).sum() / max((expected | seen).sum(), 1))


def score(engine: Engine, chosen: Sequence[Case], steps: int, control_scale: float | None) -> Score:
    """Scores one image of each case; control_scale None leaves out its drawing."""
    overlaps, right = [], []
    for case, pixels in zip(chosen, run_jobs(engine, _jobs(engine, chosen, steps, control_scale)), strict=True):
        overlaps.append(overlap(pixels, case.scene))
        requirement = replace(case.scene.requirement, size=None)  # the drawing decides it
        right.append(judge(pixels, requirement).correct and overlaps[-1] >= MIN_OVERLAP)
    return Score(
        follows=statistics.fmean(share >= MIN_OVERLAP for share in overlaps),
        right=statistics.fmean(right),
        median_overlap=statistics.median(overlaps),
    )


def _jobs(engine: Engine, chosen: Sequence[Case], steps: int, control_scale: float | None) -> list[Job]:
    width, height = engine.limits.default_size
    return [
        Job(
            case.caption,
            number,
            width,
            height,
            steps,
            control_image=None if control_scale is None else case.drawing,
            control_scale=control_scale or 0.0,
        )
        for number, case in enumerate(chosen)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    from engines.loader import load_engine  # loads torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--controlnet", help="its folder; default: controlnet/ in the checkpoint")
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="control_scale, 0 to 2 (default 1)")
    options = parser.parse_args(argv)
    engine = load_engine(options.model, controlnet=options.controlnet)
    try:
        chosen = cases(options.cases, engine.limits.default_size[0])
        scores = {
            "drawn": score(engine, chosen, options.steps, options.scale),
            "without": score(engine, chosen, options.steps, None),
        }
    finally:
        engine.close()
    print(f"{'':10}  follows   right  median overlap")
    for name, result in scores.items():
        print(f"{name:10}  {result.follows:7.1%} {result.right:7.1%}  {result.median_overlap:.2f}")
    settings = {"model": options.model, "steps": options.steps, "cases": options.cases, "scale": options.scale}
    print(json.dumps(settings | {name: asdict(result) for name, result in scores.items()}))


if __name__ == "__main__":
    main()
