"""Percentiles and tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

STAGES = ("text", "denoise", "decode")  # of the engine


class Percentiles(TypedDict):
    """Percentiles of one quantity, in its unit."""

    p50: float
    p95: float
    p99: float
    mean: float
    max: float
    count: int


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Returns the percentiles of the values, or None without values."""
    if not values:
        return None
    p50, p95, p99 = (round(float(value), 6) for value in np.percentile(values, [50, 95, 99]))
    mean, largest = round(float(np.mean(values)), 6), round(float(max(values)), 6)
    return Percentiles(p50=p50, p95=p95, p99=p99, mean=mean, max=largest, count=len(values))


def counted(labels: Mapping[str, int], most: int | None = None) -> str:
    """Returns the most common labels, None: all, as in `200 x9, 429 x1`."""
    return ", ".join(f"{label} x{count}" for label, count in Counter(labels).most_common(most))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table with aligned columns and floats of four significant digits."""
    cells = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)
