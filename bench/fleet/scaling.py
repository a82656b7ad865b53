"""How many replicas are wanted: the rule of server.cluster with the delays that Ray Serve adds, and the chart's.

Delays and the autoscaler of Kubernetes are modelled here, because they are Ray's and Kubernetes' own code; the rule by
which a replica is wanted is the server's.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bench.harness.errors import BenchError
from server.cluster.scaling import IN_FLIGHT, WAITING, ByWaitingJobs

RULES = ("none", "cluster", "chart")
SYNC_S, TOLERANCE, CALM_S = 15.0, 0.1, 300.0  # of a HorizontalPodAutoscaler; CALM_S as the chart sets it
DOUBLED, ADDED = 2, 4  # it at most doubles, or adds four, each SYNC_S


@dataclass(frozen=True, slots=True)
class Load:
    """What the replicas report, added up. `target`: how many run or were started."""

    waiting: int
    inside: int
    running: int
    target: int


class Rule(Protocol):
    """Asked every `every_s` seconds."""

    every_s: float

    def wanted(self, now: float, load: Load) -> int: ...


@dataclass(slots=True)
class _Context:
    current_num_replicas: int
    target_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]]


class Cluster:
    """server.cluster: `upscale_delay_s` and `downscale_delay_s` are how long the rule must say the same."""

    def __init__(
        self, target_waiting_jobs: int, max_batch: int, upscale_delay_s: float, downscale_delay_s: float
    ) -> None:
        self.every_s = 1.0
        self._rule = ByWaitingJobs(target_waiting_jobs, max_batch)
        self._upscale_delay_s, self._downscale_delay_s = upscale_delay_s, downscale_delay_s
        self._seen: deque[tuple[float, int, int]] = deque()
        self._since: tuple[int, float] = (0, 0.0)  # the way it points, and since when

    def wanted(self, now: float, load: Load) -> int:
        self._seen.append((now, load.waiting, load.inside))
        while self._seen[0][0] < now - max(self._upscale_delay_s, 1.0):  # Serve's look_back_period_s
            self._seen.popleft()
        waiting, inside = (sum(one[part] for one in self._seen) / len(self._seen) for part in (1, 2))
        metrics = {WAITING: {"all": waiting}, IN_FLIGHT: {"all": inside}}
        wanted, _ = self._rule(_Context(load.running, load.target, metrics))
        way = (wanted > load.target) - (wanted < load.target)
        if way != self._since[0]:
            self._since = (way, now)
        held = now - self._since[1]
        if (way > 0 and held >= self._upscale_delay_s) or (way < 0 and held >= self._downscale_delay_s):
            self._since = (0, now)
            return wanted
        return load.target


class Chart:
    """A HorizontalPodAutoscaler on the mean of sana_sprint_jobs_waiting."""

    def __init__(self, target_waiting_jobs: int) -> None:
        self.every_s = SYNC_S
        self._target_waiting_jobs = target_waiting_jobs
        self._said: deque[tuple[float, int]] = deque()

    def wanted(self, now: float, load: Load) -> int:
        ratio = load.waiting / max(load.running, 1) / self._target_waiting_jobs
        steady = abs(ratio - 1) <= TOLERANCE
        wanted = load.target if steady else math.ceil(load.running * ratio)
        self._said.append((now, wanted))
        while self._said[0][0] < now - CALM_S:
            self._said.popleft()
        if wanted < load.target:
            return min(load.target, max(said for _, said in self._said))
        return min(wanted, max(DOUBLED * load.target, ADDED + load.target))


def rule(
    name: str, *, target_waiting_jobs: int, max_batch: int, upscale_delay_s: float, downscale_delay_s: float
) -> Rule | None:
    """None: as many as there are. Raises BenchError."""
    if name not in RULES:
        raise BenchError(f"--scale: got {name!r}, allowed: {', '.join(RULES)}")
    if name == "cluster":
        return Cluster(target_waiting_jobs, max_batch, upscale_delay_s, downscale_delay_s)
    return Chart(target_waiting_jobs) if name == "chart" else None
