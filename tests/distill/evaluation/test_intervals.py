"""Intervals over seeds and prompts at once: as wide as chance is, narrower when paired."""

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.evaluation.intervals import crossed_interval
from distill.world.scenes import WorldError


def trained(rng: np.random.Generator, seeds: int, prompts: int, gain: float) -> NDArray[np.float64]:
    """Scores [seeds, prompts] that vary with seed, prompt and image."""
    of_seeds, of_prompts = rng.normal(0, 0.1, (seeds, 1)), rng.normal(0, 0.3, (1, prompts))
    return gain + of_seeds + of_prompts + rng.normal(0, 0.2, (seeds, prompts))


def test_an_interval_covers_trainings_and_prompts_alike() -> None:
    rng = np.random.default_rng(0)
    categories = ["a", "b"] * 30
    intervals = [crossed_interval(trained(rng, 12, 60, 0.5), categories) for _ in range(100)]
    assert 85 <= sum(low <= 0.5 <= high for _, low, high in intervals) <= 100
    by_prompts_alone = 2 * 1.96 * 0.3 / 60**0.5
    assert np.mean([high - low for _, low, high in intervals]) > by_prompts_alone * 1.1


def test_what_both_systems_share_does_not_widen_their_difference() -> None:
    rng = np.random.default_rng(1)
    one = trained(rng, 5, 60, 0.5)
    better = one + 0.05
    difference = crossed_interval(better - one, ["a"] * 60)
    assert difference == pytest.approx((0.05, 0.05, 0.05))
    assert not difference.holds_zero
    assert crossed_interval(one - one.mean(), ["a"] * 60).holds_zero


def test_categories_weigh_alike_whatever_their_size() -> None:
    values = np.array([[1.0] * 9 + [0.0]])
    assert crossed_interval(values, ["a"] * 9 + ["b"]) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("shape", "categories"), [((0, 3), 3), ((2, 0), 0), ((2, 3), 2), ((3,), 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...], categories: int) -> None:
    with pytest.raises(WorldError, match="seeds, prompts"):
        crossed_interval(np.zeros(shape), ["a"] * categories)
