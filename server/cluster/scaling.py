"""How many replicas: more while jobs wait, fewer once fewer would do. Plain arithmetic on what replicas report.

Ray Serve calls this every few hundred milliseconds and adds bounds and delays of its own.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

WAITING, INSIDE = "jobs_waiting", "jobs_inside"  # what Replica.record_autoscaling_stats reports


class Context(Protocol):
    """The part of ray.serve.config.AutoscalingContext that counts here."""

    current_num_replicas: int
    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class ByWaitingJobs:
    """Enough replicas that at most `target_waiting_jobs` jobs wait at each; one fewer when none wait and what is inside
    would fill the others to at most half a batch of `max_batch`."""

    def __init__(self, target_waiting_jobs: int, max_batch: int) -> None:
        self._target_waiting_jobs = target_waiting_jobs
        self._max_batch = max_batch

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The number wanted, and no state to keep."""
        found = context.aggregated_metrics or {}
        if not found.get(WAITING):
            return context.target_num_replicas, {}
        waiting, inside = (sum(found.get(name, {}).values()) for name in (WAITING, INSIDE))
        running, wanted = context.current_num_replicas, context.target_num_replicas
        if waiting > self._target_waiting_jobs * running:
            return max(wanted, math.ceil(waiting / self._target_waiting_jobs)), {}
        if running > 1 and waiting < 1 and inside <= (running - 1) * self._max_batch / 2:
            return min(wanted, running - 1), {}
        return wanted, {}
