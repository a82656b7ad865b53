"""How long each phase of a start took; phases may run side by side, each on a thread of its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """`seconds`: of each phase that has ended, by its name, in the order in which they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)
