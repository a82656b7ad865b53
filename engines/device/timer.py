"""Seconds of laps on the device. CUDA events measure them, so that the end of a lap does not wait for the work."""

import time
from itertools import pairwise
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in time, with the methods of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any) -> float:
        """Returns the milliseconds until `later`, an event of the same class."""


class CpuEvent:
    """An Event of the CPU's clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Returns at once: the CPU has finished all earlier work."""

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
    """Measures laps from its construction on."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[Event] = []
        self.record()

    def record(self) -> None:
        """Ends a lap after the work queued so far."""
        event: Event = CudaEvent() if self._cuda else CpuEvent()
        event.record()
        self._events.append(event)

    def laps(self, count: int | None = None) -> list[float]:
        """Returns the seconds of the first `count` laps (None: all) and waits for the end of the last."""
        events = self._events if count is None else self._events[: count + 1]
        events[-1].synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(events)]
