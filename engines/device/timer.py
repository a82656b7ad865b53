"""Seconds of laps on the device. CUDA events measure them, so that the end of a lap does not wait for the work."""

import time
from itertools import pairwise
from typing import Any

import torch


class CpuEvent:
    """A point in time of the CPU's clock, with the methods of torch.cuda.Event."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Returns at once: the CPU has finished all earlier work."""

    def elapsed_time(self, later: "CpuEvent") -> float:
        """Returns the milliseconds until `later`."""
        return (later._seconds - self._seconds) * 1000


class Stopwatch:
    """Measures laps from its construction on."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: list[Any] = []
        self.record()

    def record(self) -> None:
        """Ends a lap after the work queued so far."""
        cuda_event: Any = torch.cuda.Event  # untyped in torch's stubs
        event = cuda_event(enable_timing=True) if self._cuda else CpuEvent()
        event.record()
        self._events.append(event)

    def laps(self, count: int) -> list[float]:
        """Returns the seconds of the first `count` laps and waits for the end of the last."""
        events = self._events[: count + 1]
        events[-1].synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(events)]
