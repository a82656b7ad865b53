"""Jobs that wait, in one bounded queue that the event loop fills and the engine thread empties.

Knows slots, batch keys, ages and deadlines. Knows no engine, no event loop and no HTTP. All times are of one clock,
time.monotonic() in a server; bench.fleet runs this very queue on the time of a simulation.
Slots count what may pile up: a job holds one from before its request is prepared until its picture is encoded.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

from engines.types import BatchKey, Job, RawImage


@dataclass(eq=False, slots=True)
class QueuedJob:
    """A job in the queue, and the future that its request waits on (the queue never touches the future)."""

    job: Job
    encode: Callable[[RawImage], bytes]  # what makes a file of its picture
    future: asyncio.Future[Any]
    deadline: float
    submitted: float = field(default_factory=time.monotonic)
    sequence: int = 0  # given by the queue: lower is older
    has_pixels: bool = False  # its picture is there, and about to be encoded


class JobQueue:
    """Holds at most `max_waiting` jobs that wait (or are about to), and `max_in_flight` that are not yet answered."""

    def __init__(self, *, max_waiting: int, max_in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_waiting = max_waiting
        self.max_in_flight = max_in_flight
        self._clock = clock
        self._filled = threading.Condition()
        self._waiting: dict[BatchKey, OrderedDict[int, QueuedJob]] = {}
        self._places = count()
        self._reserved = 0
        self._queued = 0
        self._in_flight = 0
        self._closed = False
        self._woken = False

    @classmethod
    def for_engine(cls, *, max_queue: int, max_batch: int, clock: Callable[[], float] = time.monotonic) -> Self:
        """In front of one engine: beyond those that wait, a batch that runs and one whose images are being encoded."""
        return cls(max_waiting=max_queue, max_in_flight=max_queue + 2 * max_batch, clock=clock)

    @property
    def waiting(self) -> int:
        """Jobs that were accepted and are not in a batch yet."""
        return self._queued + self._reserved

    @property
    def in_flight(self) -> int:
        """Jobs that were accepted and whose request is not answered yet."""
        return self._in_flight

    def has_room(self, jobs: int) -> bool:
        return self.waiting + jobs <= self.max_waiting and self._in_flight + jobs <= self.max_in_flight

    def reserve(self, jobs: int) -> bool:
        """Takes `jobs` slots, all or none; says whether it did."""
        with self._filled:
            if not self.has_room(jobs):
                return False
            self._reserved += jobs
            self._in_flight += jobs
            return True

    def put(self, entries: Iterable[QueuedJob]) -> None:
        """Queues jobs whose slots were reserved."""
        with self._filled:
            for entry in entries:
                entry.sequence = next(self._places)
                self._waiting.setdefault(entry.job.key, OrderedDict())[entry.sequence] = entry
                self._reserved -= 1
                self._queued += 1
            self._filled.notify()

    def cancel(self, entry: QueuedJob) -> bool:
        """Takes a job out again; False where it is in a batch, or gone, already."""
        with self._filled:
            group = self._waiting.get(entry.job.key)
            if group is None or group.pop(entry.sequence, None) is None:
                return False
            self._shrink(entry.job.key, group, 1)
            return True

    def replace(self, entry: QueuedJob, job: Job, encode: Callable[[RawImage], bytes]) -> bool:
        """Makes a job that still waits another one, in its place. False where it is in a batch, or gone, already."""
        with self._filled:
            key = entry.job.key
            group = self._waiting.get(key)
            if group is None or entry.sequence not in group:
                return False
            if job.key != key:
                del group[entry.sequence]
                if not group:
                    del self._waiting[key]
                joined = self._waiting.get(job.key, {}) | {entry.sequence: entry}
                self._waiting[job.key] = OrderedDict(sorted(joined.items()))
            entry.job, entry.encode = job, encode
            return True

    def release(self, *, unused: int, jobs: int) -> None:
        """Gives back `jobs` slots, `unused` of which never queued a job."""
        with self._filled:
            self._reserved -= unused
            self._in_flight -= jobs

    def take(self, largest: Callable[[BatchKey], int]) -> tuple[list[QueuedJob], list[QueuedJob]] | None:
        """Blocks until jobs wait; then the oldest job's key decides, and its jobs go, oldest first, up to largest(key).

        Returns the batch, and the jobs met on the way whose deadline had passed; both are empty after `wake` alone.
        None once the queue is closed and empty.
        """
        with self._filled:
            while not self._waiting:
                if self._closed:
                    return None
                if self._woken:
                    self._woken = False
                    return [], []
                self._filled.wait()
            key = min(self._waiting, key=lambda key: next(iter(self._waiting[key])))
            group, room, now = self._waiting[key], largest(key), self._clock()
            batch: list[QueuedJob] = []
            expired: list[QueuedJob] = []
            while group and len(batch) < room:
                _, entry = group.popitem(last=False)
                (expired if entry.deadline <= now else batch).append(entry)
            self._shrink(key, group, len(batch) + len(expired))
            return batch, expired

    def clear(self) -> list[QueuedJob]:
        """Takes everything out."""
        with self._filled:
            entries = [entry for group in self._waiting.values() for entry in group.values()]
            self._waiting.clear()
            self._queued = 0
            return entries

    def close(self) -> None:
        """Lets `take` return None once nothing waits."""
        with self._filled:
            self._closed = True
            self._filled.notify_all()

    def wake(self) -> None:
        """Lets a `take` that waits for jobs return without any."""
        with self._filled:
            self._woken = True
            self._filled.notify_all()

    def _shrink(self, key: BatchKey, group: OrderedDict[int, QueuedJob], jobs: int) -> None:
        self._queued -= jobs
        if not group:
            del self._waiting[key]
