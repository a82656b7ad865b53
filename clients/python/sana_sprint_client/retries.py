"""Decides when a refused request is retried. Retries are safe: the same prompt and seed make the same image."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

AGAIN = (429, 503)  # the queue is full; loading, draining, or a check that failed


@dataclass(frozen=True, slots=True)
class Retries:
    """At most `attempts` in all, and at most `longest_s` seconds between two of them."""

    attempts: int = 5
    longest_s: float = 30.0
    first_s: float = 0.5  # where the server names no time; doubled each time

    def pause(self, attempt: int, status: int, headers: Mapping[str, str]) -> float | None:
        """Seconds until the next attempt, after `attempt` of them (from 1); None where there is none.

        A server that asks for more than `longest_s` is not asked again: it would refuse once more.
        """
        if status not in AGAIN or attempt >= self.attempts:
            return None
        try:
            asked = float(headers.get("retry-after", ""))
        except ValueError:
            doubled: float = self.first_s * 2 ** (attempt - 1)
            return min(doubled, self.longest_s) * random.uniform(0.5, 1.0)  # so that not all come back at once
        return asked if 0 <= asked <= self.longest_s else None
