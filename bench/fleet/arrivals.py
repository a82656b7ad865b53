"""Seeded arrival streams: endless (seconds, job) pairs in ascending order."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.cli import parse_size
from bench.harness.errors import BenchError
from engines.types import Job

BURST_FACTOR, BURST_S, CALM_S = (
    3.0,
    5.0,
    20.0,
)  # bursty: factor of the calm rate, mean seconds of a burst and between bursts
DIURNAL_SWING = 0.8  # diurnal: the rate swings by this share of its mean, from 0.2 to 1.8 of it
ARRIVALS = ("poisson", "bursty", "diurnal")


@dataclass(frozen=True, slots=True)
class Share:
    """A kind of request and its share of all."""

    width: int
    height: int
    steps: int
    share: float

    @property
    def job(self) -> Job:
        return Job("", 0, self.width, self.height, self.steps)


def parse_mix(text: str) -> list[Share]:
    """Parses size, steps and share from `1024x1024:1:0.8,512:2:0.2`. Raises BenchError."""
    try:
        parts = [part.split(":") for part in text.split(",")]
        return [Share(*parse_size(size), int(steps), float(share)) for size, steps, share in parts]
    except ValueError as error:
        raise BenchError(f"--mix: got {text!r}, needed is SIZE:STEPS:SHARE, several separated by commas") from error


def stream(kind: str, rate: float, shares: Sequence[Share], seed: int, period_s: float) -> Iterator[tuple[float, Job]]:
    """Returns arrivals at `rate` a second on average; a `diurnal` day of `period_s` starts at its mean and rises."""
    rng = random.Random(seed)
    times = {"poisson": _poisson, "bursty": _bursty}.get(kind)
    arriving = _diurnal(rate, rng, period_s) if times is None else times(rate, rng)
    jobs, weights = [share.job for share in shares], [share.share for share in shares]
    if len(jobs) == 1:
        return ((at, jobs[0]) for at in arriving)
    choose = random.Random(seed + 1)
    return ((at, choose.choices(jobs, weights)[0]) for at in arriving)


def read_arrivals(path: Path) -> list[tuple[float, Job]]:
    """Reads JSON lines with `at` in seconds; `width`, `height`, `steps` default to 1024, 1024, 1.

    Raises BenchError.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        arrivals = [
            (float(row["at"]), Job("", 0, row.get("width", 1024), row.get("height", 1024), row.get("steps", 1)))
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f'{path}: {error!r}; needed are lines such as {{"at": 0.5, "steps": 1}}') from error
    return sorted(arrivals, key=lambda arrival: arrival[0])


def _poisson(rate: float, rng: random.Random) -> Iterator[float]:
    at, gap = 0.0, rng.expovariate
    while True:
        at += gap(rate)
        yield at


def _bursty(rate: float, rng: random.Random) -> Iterator[float]:
    """Yields a Markov-modulated Poisson process whose rate is BURST_FACTOR times as high in bursts."""
    calm = rate * (CALM_S + BURST_S) / (CALM_S + BURST_FACTOR * BURST_S)
    at, bursting = 0.0, False
    while True:
        end = at + rng.expovariate(1 / (BURST_S if bursting else CALM_S))
        now = calm * (BURST_FACTOR if bursting else 1.0)
        while (at := at + rng.expovariate(now)) < end:
            yield at
        at, bursting = end, not bursting  # memoryless: later arrivals are drawn again


def _diurnal(rate: float, rng: random.Random, period_s: float) -> Iterator[float]:
    """Thins a Poisson process of the highest rate."""
    at, most = 0.0, 1 + DIURNAL_SWING
    while True:
        at += rng.expovariate(rate * most)
        if rng.random() * most < 1 + DIURNAL_SWING * math.sin(2 * math.pi * at / period_s):
            yield at
