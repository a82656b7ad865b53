"""Image to image on the shipped checkpoint: similarity to the input falls with the strength."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from distill.world.captions import caption_of
from distill.world.rendering import render, sample_scene
from distill.world.scenes import World
from engines.loader import load_engine
from engines.types import Engine, Job, Pixels

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"
CASES = 12
STRENGTHS = (0.0, 0.15, 0.3, 0.5, 0.8, 1.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(str(TINY), precision="fp32", max_batch=CASES)


@pytest.fixture(scope="module")
def cases() -> list[tuple[Pixels, str]]:
    """Renders one thing per case, with a caption of another."""
    pairs = []
    for number in range(CASES):
        rng = np.random.default_rng((77, number))
        shown, described = (sample_scene(World(), rng, "single_object", "held_out") for _ in range(2))
        pairs.append((render(World(), shown, 256), caption_of(described.requirement, rng)))
    return pairs


def changes(engine: Engine, cases: list[tuple[Pixels, str]], steps: int) -> list[float]:
    """Returns the mean absolute difference to the input, in levels of 255, at each of STRENGTHS."""
    differences = []
    for strength in STRENGTHS:
        jobs = [
            Job(caption, seed, 256, 256, steps, image=image, strength=strength)
            for seed, (image, caption) in enumerate(cases)
        ]
        pairs = zip(engine.generate(jobs), cases, strict=True)
        differences.append(fmean(np.abs(result.pixels.astype(int) - image).mean() for result, (image, _) in pairs))
    return differences


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_similarity_falls_with_strength(engine: Engine, cases: list[tuple[Pixels, str]], steps: int) -> None:
    differences = changes(engine, cases, steps)
    # Where nothing of an input remains, the noise decides: 0.3 of 255 either way.
    assert all(later > earlier - 1 for earlier, later in pairwise(differences)), differences
    assert differences[0] < 5, "strength 0 is the input through the autoencoder"
    assert differences[1] < differences[-1] / 2, "a weak strength keeps most of the input, at any number of steps"
    assert differences[2] < 0.8 * differences[-1], differences
