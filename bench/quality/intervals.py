"""Means with 95 % intervals, by a seeded bootstrap over prompts, because images of one prompt are not independent."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.harness.errors import BenchError
from distill.evaluation.intervals import RESAMPLES, Interval, bounds


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the interval of a mean over independent prompts, one value each. Raises BenchError without values."""
    return grouped_interval({"": values})


def grouped_interval(groups: Mapping[str, Sequence[float]]) -> Interval:
    """Returns the interval of a mean of group means (GenEval's categories), resampling prompts within groups.

    For a paired comparison, pass the differences of two systems on each prompt. Raises BenchError for an empty group.
    """
    if not groups or not all(len(values) for values in groups.values()):
        raise BenchError("interval: got a group without values, needed is one prompt at least in each")
    rng = np.random.default_rng(0)
    mean, drawn = 0.0, np.zeros(RESAMPLES)
    for values in groups.values():
        array = np.asarray(values, np.float64)
        mean += float(array.mean()) / len(groups)
        drawn += _resampled(array, rng) / len(groups)
    low, high = bounds(drawn)
    return Interval(round(mean, 6), round(low, 6), round(high, 6))


def ratio_interval(baseline: Sequence[float], candidate: Sequence[float]) -> Interval:
    """Returns the interval of the ratio of medians, candidate over baseline, resampling pairs of runs."""
    if len(baseline) != len(candidate) or not baseline:
        raise BenchError(
            f"interval: got {len(baseline)} and {len(candidate)} runs, needed are as many pairs, one at least"
        )
    pairs = np.stack([np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)])
    chosen = np.random.default_rng(0).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, chosen], axis=2)
    low, high = bounds(medians[1] / medians[0])
    mean = float(np.median(pairs[1]) / np.median(pairs[0]))
    return Interval(round(mean, 4), round(low, 4), round(high, 4))


def _resampled(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns [RESAMPLES] means of samples drawn with replacement."""
    means = np.empty(RESAMPLES)
    step = max(1, 2**22 // len(values))  # bounds the memory
    for first in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - first)
        means[first : first + count] = values[rng.integers(0, len(values), (count, len(values)))].mean(1)
    return means
