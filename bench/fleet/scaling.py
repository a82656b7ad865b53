"""Scaling rules: server.cluster's with the delays of Ray Serve, and the chart's HorizontalPodAutoscaler.

The rule of server.cluster is the server's code. Ray's delays and Kubernetes' autoscaler are modelled here, because they
are not ours.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bench.harness.errors import BenchError
from server.cluster.scaling import IN_FLIGHT, WAITING, ByWaitingJobs

RULES = ("none", "cluster", "chart")
SYNC_S, TOLERANCE, STABILIZATION_S = 15.0, 0.1, 300.0  # of a HorizontalPodAutoscaler; CALM_S as the chart sets it
MAX_FACTOR, MAX_ADDED = 2, 4  # it at most doubles, or adds four, each SYNC_S


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """The sum of what the replicas report. `target`: replicas that run or were started."""

    waiting: int
    in_flight: int
    running: int
    target: int


class Rule(Protocol):
    """A scaling rule, evaluated every `every_s` seconds."""

    every_s: float

    def wanted(self, now: float, load: FleetLoad) -> int: ...


@dataclass(slots=True)
class _Context:
    current_num_replicas: int
    target_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]]


class Cluster:
    """server.cluster's rule; its result must hold for `upscale_delay_s` or `downscale_delay_s`."""

    def __init__(
        self, target_waiting_jobs: int, max_batch: int, upscale_delay_s: float, downscale_delay_s: float
    ) -> None:
        self.every_s = 1.0
        self._rule = ByWaitingJobs(target_waiting_jobs, max_batch)
        self._up_s, self._down_s = upscale_delay_s, downscale_delay_s
        self._seen: deque[tuple[float, int, int]] = deque()
        self._since: tuple[int, float] = (0, 0.0)  # the way it points, and since when

    def wanted(self, now: float, load: FleetLoad) -> int:
        self._seen.append((now, load.waiting, load.in_flight))
        while self._seen[0][0] < now - max(self._up_s, 1.0):  # Serve's look_back_period_s
            self._seen.popleft()
        waiting, in_flight = (sum(sample[part] for sample in self._seen) / len(self._seen) for part in (1, 2))
        metrics = {WAITING: {"all": waiting}, IN_FLIGHT: {"all": in_flight}}
        wanted, _ = self._rule(_Context(load.running, load.target, metrics))
        direction = (wanted > load.target) - (wanted < load.target)
        if direction != self._since[0]:
            self._since = (direction, now)
        held_s = now - self._since[1]
        if (direction > 0 and held_s >= self._up_s) or (direction < 0 and held_s >= self._down_s):
            self._since = (0, now)
            return wanted
        return load.target


class Chart:
    """A HorizontalPodAutoscaler on the mean of sana_sprint_jobs_waiting."""

    def __init__(self, target_waiting_jobs: int) -> None:
        self.every_s = SYNC_S
        self._jobs_waiting = target_waiting_jobs
        self._recommendations: deque[tuple[float, int]] = deque()

    def wanted(self, now: float, load: FleetLoad) -> int:
        ratio = load.waiting / max(load.running, 1) / self._jobs_waiting
        steady = abs(ratio - 1) <= TOLERANCE
        wanted = load.target if steady else math.ceil(load.running * ratio)
        self._recommendations.append((now, wanted))
        while self._recommendations[0][0] < now - STABILIZATION_S:
            self._recommendations.popleft()
        if wanted < load.target:
            return min(load.target, max(recommended for _, recommended in self._recommendations))
        return min(wanted, max(MAX_FACTOR * load.target, MAX_ADDED + load.target))


def rule(
    name: str, *, target_waiting_jobs: int, max_batch: int, upscale_delay_s: float, downscale_delay_s: float
) -> Rule | None:
    """Returns the rule of that name, None for a fixed fleet. Raises BenchError."""
    if name not in RULES:
        raise BenchError(f"--scale: got {name!r}, allowed: {', '.join(RULES)}")
    if name == "cluster":
        return Cluster(target_waiting_jobs, max_batch, upscale_delay_s, downscale_delay_s)
    return Chart(target_waiting_jobs) if name == "chart" else None
