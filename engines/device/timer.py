"""Seconds between laps, as the device spent them. On CUDA by events, so that a lap does not wait for the work."""

import time
from itertools import pairwise
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in time, with the methods of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds until `later`, a mark of the same kind."""


class CpuEvent:
    """An Event of the CPU's clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """The CPU has done what came before."""

    def elapsed_time(self, later: "CpuEvent") -> float:
        return (later.seconds - self.seconds) * 1000


class CudaEvent:
    """An Event on the current stream."""

    def __init__(self) -> None:
        make: Any = torch.cuda.Event  # untyped in torch's stubs
        self.event = make(enable_timing=True)

    def record(self) -> None:
        self.event.record()

    def synchronize(self) -> None:
        self.event.synchronize()

    def elapsed_time(self, later: "CudaEvent") -> float:
        return float(self.event.elapsed_time(later.event))


class Stopwatch:
    """Started when it is made."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Event] = []
        self.record()

    def record(self) -> None:
        """Ends a lap at what the device has been given so far."""
        mark: Event = CudaEvent() if self._cuda else CpuEvent()
        mark.record()
        self._marks.append(mark)

    def laps(self, count: int | None = None) -> list[float]:
        """The first `count` laps, None: all; waits until the device has ended the last of them."""
        marks = self._marks if count is None else self._marks[: count + 1]
        marks[-1].synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]
