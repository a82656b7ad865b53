"""How long each phase of a start took; phases may run side by side, each on a thread of its own."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Phases:
    """`seconds`: of each phase that has ended, by its name, in the order in which they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        with self.phase(name):
            return work()

    def begin(self, name: str, work: Callable[[], T], pool: Executor | None) -> Future[T]:
        """Begins a phase on a thread of `pool`; without one it is over when this returns."""
        if pool is not None:
            return pool.submit(self.timed, name, work)
        done: Future[T] = Future()
        done.set_result(self.timed(name, work))
        return done
