"""Image to image on the shipped checkpoint: the farther the strength, the less of the input is left."""

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
    """Pictures of one thing each, and words for another."""
    found = []
    for number in range(CASES):
        rng = np.random.default_rng((77, number))
        drawn, asked = (sample_scene(World(), rng, "single_object", "held_out") for _ in range(2))
        found.append((render(World(), drawn, 256), caption_of(asked.asked, rng)))
    return found


def changes(engine: Engine, cases: list[tuple[Pixels, str]], steps: int) -> list[float]:
    """Mean absolute difference to the input, in levels of 255, at each of STRENGTHS."""
    found = []
    for strength in STRENGTHS:
        jobs = [
            Job(words, seed, 256, 256, steps, image=image, strength=strength)
            for seed, (image, words) in enumerate(cases)
        ]
        made = engine.generate(jobs)
        found.append(
            fmean(np.abs(one.pixels.astype(int) - image).mean() for one, (image, _) in zip(made, cases, strict=True))
        )
    return found


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_similarity_falls_with_strength(engine: Engine, cases: list[tuple[Pixels, str]], steps: int) -> None:
    found = changes(engine, cases, steps)
    assert found == sorted(found), found
    assert found[0] < 5, "strength 0 is the input through the autoencoder"
    assert found[1] < found[-1] / 3, "a weak strength keeps most of the input, at any number of steps"
