"""Metrics, log line and trace of answered requests, a moment after the answer.

The next request of a client that waits for each answer comes first. While its image is made, the event loop is idle
(bench/LOG.md: 0.14 of 7.17 ms).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

DELAY_S = 0.002

logger = logging.getLogger("server.telemetry")


class Bookkeeping:
    """Used on the event loop."""

    def __init__(self) -> None:
        self._left: deque[Callable[[], None]] = deque()

    def later(self, work: Callable[[], None]) -> None:
        """Runs `work` within some DELAY_S, and before the next `finish` returns."""
        if not self._left:
            asyncio.get_running_loop().call_later(DELAY_S, self.finish)
        self._left.append(work)

    def finish(self) -> None:
        """Runs all that is left, in order. Logs errors."""
        while self._left:
            work = self._left.popleft()
            try:
                work()
            except Exception:  # of one request; those after it go on
                logger.exception("metrics, log line or trace of a request failed")
