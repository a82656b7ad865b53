"""Decides the wait before a refused request is repeated. Repeating is safe: the same prompt and seed give one image."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

RETRIED = (429, 503)  # the queue is full; the server loads, drains, or a safety check failed


@dataclass(frozen=True, slots=True)
class Retries:
    """Limits: at most `attempts` in all, and at most `longest_s` seconds between two of them."""

    attempts: int = 5
    longest_s: float = 30.0
    first_s: float = 0.5  # without Retry-After; doubled each time

    def pause(self, attempt: int, status: int, headers: Mapping[str, str]) -> float | None:
        """Returns the seconds until the next attempt, or None for no further one. `attempt` counts from 1.

        A Retry-After above `longest_s` ends the attempts, because an earlier one would be refused.
        """
        if status not in RETRIED or attempt >= self.attempts:
            return None
        try:
            retry_after = float(headers.get("retry-after", ""))
        except ValueError:
            doubled: float = self.first_s * 2 ** (attempt - 1)
            return min(doubled, self.longest_s) * random.uniform(0.5, 1.0)  # so that clients do not return all at once
        return retry_after if 0 <= retry_after <= self.longest_s else None
