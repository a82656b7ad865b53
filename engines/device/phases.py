"""Times of the phases of a start. Phases may run in parallel, each on a thread of its own."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


class Phases:
    """`seconds`: name of each finished phase -> its duration, in the order of their ends. May begin with others."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds

    def timed(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - began, 3)
        return result

    def begin(self, name: str, work: Callable[[], T], pool: Executor | None) -> Future[T]:
        """Starts a phase on a thread of `pool`. Without a pool, it runs the phase before it returns."""
        if pool is not None:
            return pool.submit(self.timed, name, work)
        done: Future[T] = Future()
        done.set_result(self.timed(name, work))
        return done
