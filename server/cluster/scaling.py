"""The autoscaling policy: replicas are added while jobs wait and removed once fewer suffice.

Ray Serve calls it every few hundred milliseconds and applies its own bounds and delays.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

WAITING, IN_FLIGHT = "target_waiting_jobs", "jobs_in_flight"  # keys of Replica.record_autoscaling_stats


class Context(Protocol):
    """The part of ray.serve.config.AutoscalingContext that the policy reads."""

    current_num_replicas: int
    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class ByWaitingJobs:
    """Ray Serve's autoscaling policy.

    Enough replicas that at most `target_waiting_jobs` jobs wait at each. One fewer when no job waits and the jobs in
    flight would fill the remaining replicas to at most half a batch of `max_batch`.
    """

    def __init__(self, target_waiting_jobs: int, max_batch: int) -> None:
        self._target_waiting_jobs = target_waiting_jobs
        self._max_batch = max_batch

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Returns the desired number of replicas, and an empty state."""
        reported = context.aggregated_metrics or {}
        if not reported.get(WAITING):
            return context.target_num_replicas, {}
        waiting, in_flight = (sum(reported.get(name, {}).values()) for name in (WAITING, IN_FLIGHT))
        running, target = context.current_num_replicas, context.target_num_replicas
        if waiting > self._target_waiting_jobs * running:
            return max(target, math.ceil(waiting / self._target_waiting_jobs)), {}
        if running > 1 and waiting < 1 and in_flight <= (running - 1) * self._max_batch / 2:
            return min(target, running - 1), {}
        return target, {}
