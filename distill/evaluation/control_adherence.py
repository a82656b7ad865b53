"""Does the picture follow the drawing? Places of things, with the drawing and without it.

    python -m distill.evaluation.control_adherence --model models/tiny --cases 200        # last line: one JSON document

Each case is a held-out caption of one thing, a place and a size drawn at random, and a drawing of its outline by an
unsteady hand. The picture follows where what has the caption's colour overlaps the thing's true mask by at least 0.7
(intersection over union); it is right where, besides, the judge sees that thing and nothing else.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from distill.stages.controlnet import control_world
from distill.world.captions import caption_of
from distill.world.judge import COLOUR_REACH, judge
from distill.world.rendering import Scene, World, coverage, sample_scene
from distill.world.shape_matching import Mask
from distill.world.sketches import draw
from engines.types import Engine, Job, Pixels

OVERLAP = 0.7
SALT = 2**40  # seeds of cases, far from those of training


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


def cases(count: int, size: int, seed: int = 0, world: World | None = None) -> list[Case]:
    """Cases that training has not seen: captions of the held-out split, drawings of other seeds."""
    world = control_world(world or World())
    found = []
    for number in range(count):
        rng = np.random.default_rng((SALT + seed, number))
        scene = sample_scene(world, rng, "single_object", "held_out")
        found.append(Case(scene, caption_of(scene.asked, rng), draw(scene, size, rng)))
    return found


def overlap(pixels: Pixels, scene: Scene, world: World | None = None) -> float:
    """Intersection over union of the scene's one thing and of what has its colour in the picture."""
    world = world or World()
    (thing,) = scene.things
    height, width = pixels.shape[:2]
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5 - thing.x * width))[None, :]
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - thing.y * height))[:, None]
    wanted: Mask = coverage(thing.shape, x, y, thing.size * width, thing.angle) > 0.5
    distance = np.linalg.norm(pixels.astype(np.float32) - np.array(world.rgb(thing.colour), np.float32), axis=2)
    seen: Mask = distance < COLOUR_REACH
    return float((wanted & seen).sum() / max((wanted | seen).sum(), 1))


def score(engine: Engine, chosen: Sequence[Case], steps: int, control_scale: float | None) -> Score:
    """One picture of each case; control_scale None: without its drawing."""
    overlaps, right = [], []
    for case, pixels in zip(chosen, _pictures(engine, chosen, steps, control_scale), strict=True):
        overlaps.append(overlap(pixels, case.scene))
        asked = replace(case.scene.asked, size=None)  # the drawing says how large
        right.append(judge(pixels, asked).correct and overlaps[-1] >= OVERLAP)
    return Score(
        follows=statistics.fmean(one >= OVERLAP for one in overlaps),
        right=statistics.fmean(right),
        median_overlap=statistics.median(overlaps),
    )


def _pictures(engine: Engine, chosen: Sequence[Case], steps: int, control_scale: float | None) -> Iterator[Pixels]:
    width, height = engine.limits.default_size
    jobs = [
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
    for first in tqdm(range(0, len(jobs), engine.limits.max_batch), unit="batch", leave=False):
        for image in engine.generate(jobs[first : first + engine.limits.max_batch]):
            yield image.pixels


def main(argv: Sequence[str] | None = None) -> None:
    from engines.loader import load_engine  # torch is loaded for a run only

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
    for name, found in scores.items():
        print(f"{name:10}  {found.follows:7.1%} {found.right:7.1%}  {found.median_overlap:.2f}")
    settings = {"model": options.model, "steps": options.steps, "cases": options.cases, "scale": options.scale}
    print(json.dumps(settings | {name: asdict(found) for name, found in scores.items()}))


if __name__ == "__main__":
    main()
