"""Seconds between laps, as the device spent them. On CUDA by events, so that a lap does not wait for the work."""

import time
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in time, with the methods of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds until `later`, a mark of the same kind."""


class CpuEvent:
    """A Mark of the CPU's clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """The CPU has done what came before."""

    def elapsed_time(self, later: "CpuEvent") -> float:
        return (later.seconds - self.seconds) * 1000


class CudaEvent:
    """A Mark on the current stream; captured, it is recorded anew by each replay (external: torch.cuda.Event)."""

    def __init__(self, *, captured: bool = False) -> None:
        make: Any = torch.cuda.Event  # untyped in torch's stubs
        self.event = make(enable_timing=True, external=captured)

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

    def record(self, mark: Event | None = None) -> None:
        """Ends a lap here and now, or at a `mark` that was recorded elsewhere."""
        if mark is None:
            mark = CudaEvent() if self._cuda else CpuEvent()
            mark.record()
        self._marks.append(mark)

    def laps(self) -> list[float]:
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [first.elapsed_time(second) / 1000 for first, second in pairs]
