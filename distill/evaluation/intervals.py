"""95 % intervals of scores that several trainings (seeds) give on the same prompts, by a seeded bootstrap.

Images of one prompt are not independent, nor are images of one training. So seeds and prompts are resampled at once
(the pigeonhole bootstrap of Owen 2007), prompts within their category.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.world.scenes import WorldError

RESAMPLES = 5000
LEVEL = 95.0


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the bounds of the interval of resampled values."""
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def crossed_interval(values: NDArray[np.float64], categories: Sequence[str]) -> Interval:
    """Returns the interval of the mean over categories of `values` [seeds, prompts].

    For a paired comparison, pass the differences of two systems. Raises WorldError for other shapes and without values.
    """
    if values.ndim != 2 or not values.size or values.shape[1] != len(categories):
        raise WorldError(
            f"interval: got values {list(values.shape)} and {len(categories)} categories, needed are values "
            "[seeds, prompts], one of each at least, and a category for each prompt"
        )
    rng = np.random.default_rng(0)
    seeds, prompts = values.shape
    names = sorted(set(categories))
    once, drawn = np.zeros(prompts), np.zeros((RESAMPLES, prompts))  # weights of the prompts
    for name in names:
        members = np.flatnonzero(np.asarray(categories) == name)
        share = 1 / (len(members) * len(names))
        once[members] = share
        drawn[:, members] = share * rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    return Interval(float((values.mean(0) * once).sum()), *bounds(((of_seeds @ values) * drawn).sum(1)))
