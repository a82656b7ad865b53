"""Intervals: of a mean of groups, paired differences, ratios; seeded, and as wide as chance is."""

import numpy as np
import pytest

from bench.harness.errors import BenchError
from bench.quality.intervals import grouped_interval, mean_interval, ratio_interval


def test_a_mean_s_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = [rng.normal(1, 2, 100) for _ in range(100)]
    held = [low <= 1 <= high for _, low, high in map(mean_interval, draws)]
    assert 88 <= sum(held) <= 100
    widths = [high - low for _, low, high in map(mean_interval, draws)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 10, rel=0.1)
    assert mean_interval(draws[0]) == mean_interval(draws[0])


def test_groups_weigh_alike_whatever_their_size() -> None:
    result = grouped_interval({"a": [1.0] * 90, "b": [0.0] * 10})
    assert result == (0.5, 0.5, 0.5)
    low, high = grouped_interval({"a": [1.0, -1.0] * 20})[1:]
    assert low < 0 < high


def test_a_ratio_of_medians() -> None:
    ones = np.linspace(1, 1.2, 21)
    result = ratio_interval(list(ones), list(2 * ones))
    assert result.mean == pytest.approx(2)
    assert result.low == pytest.approx(result.high) == pytest.approx(2), "paired: what both share does not widen it"


@pytest.mark.parametrize("groups", [{}, {"a": [1.0], "b": []}])
def test_nothing_has_no_interval(groups: dict[str, list[float]]) -> None:
    with pytest.raises(BenchError, match="one prompt at least"):
        grouped_interval(groups)
    with pytest.raises(BenchError, match="as many pairs"):
        ratio_interval([1.0], [])
