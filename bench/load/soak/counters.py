"""Outcomes by kind, latencies over time, and outcomes that must not occur."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.harness.summary import Percentiles, percentiles


@dataclass(frozen=True, slots=True)
class Latency:
    """One latency. `at`: seconds from the start of the soak to the response."""

    at: float
    kind: str
    seconds: float


@dataclass
class Counters:
    """Counts labels such as `plain: 200`. `lost` holds the outcomes that must not occur."""

    seen: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    latencies: list[Latency] = field(default_factory=list)

    def count(self, kind: str, label: str, allowed: Iterable[str]) -> None:
        self.seen[f"{kind}: {label}"] += 1
        if label not in allowed:
            self.lost[f"{kind}: {label}"] += 1

    def add_latency(self, at: float, kind: str, seconds: float) -> None:
        self.latencies.append(Latency(at, kind, seconds))

    def milliseconds(self, begin: float, end: float) -> dict[str, list[float]]:
        """Returns latencies by kind, of responses in [begin, end)."""
        by_kind: dict[str, list[float]] = {}
        for entry in self.latencies:
            if begin <= entry.at < end:
                by_kind.setdefault(entry.kind, []).append(1000 * entry.seconds)
        return by_kind

    def latency_percentiles(self, begin: float, end: float) -> dict[str, Percentiles | None]:
        """Returns percentiles of `milliseconds`, by kind."""
        return {kind: percentiles(values) for kind, values in sorted(self.milliseconds(begin, end).items())}


def growth(first: float, last: float) -> float:
    """Returns the growth as a share of the first; 0 if both are 0."""
    return last / first - 1 if first else float(last != first)


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def count_increase(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts by which `after` exceeds `before`."""
    return {label: count - before.get(label, 0) for label, count in after.items() if count != before.get(label, 0)}
