"""One bounded queue of jobs: the event loop fills it, the engine thread takes batches from it.

It knows slots, batch keys, ages and deadlines, but no engine, event loop or HTTP. All times come from one clock:
time.monotonic() in a server, simulated time in bench.fleet.
A job holds a slot from before its request is prepared until its image is encoded.
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
    """A job and the future that its request awaits. The queue never touches the future."""

    job: Job
    encode: Callable[[RawImage], bytes]  # makes the image file
    future: asyncio.Future[Any]
    deadline: float
    submitted: float = field(default_factory=time.monotonic)
    sequence: int = 0  # set by the queue; lower is older
    has_pixels: bool = False  # set once the engine delivered its image


class JobQueue:
    """Holds at most `max_waiting` reserved or queued jobs, and `max_in_flight` unanswered ones."""

    def __init__(self, *, max_waiting: int, max_in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_waiting = max_waiting
        self.max_in_flight = max_in_flight
        self._clock = clock
        self._filled = threading.Condition()
        self._waiting: dict[BatchKey, OrderedDict[int, QueuedJob]] = {}
        self._sequences = count()
        self._reserved = 0
        self._queued = 0
        self._in_flight = 0
        self._closed = False
        self._woken = False

    @classmethod
    def for_engine(cls, *, max_queue: int, max_batch: int, clock: Callable[[], float] = time.monotonic) -> Self:
        """Sizes the queue for one engine: beyond the waiting jobs, one running batch and one being encoded."""
        return cls(max_waiting=max_queue, max_in_flight=max_queue + 2 * max_batch, clock=clock)

    @property
    def waiting(self) -> int:
        """Jobs accepted and not in a batch yet."""
        return self._queued + self._reserved

    @property
    def in_flight(self) -> int:
        """Jobs accepted whose request is not answered yet."""
        return self._in_flight

    def has_room(self, jobs: int) -> bool:
        return self.waiting + jobs <= self.max_waiting and self._in_flight + jobs <= self.max_in_flight

    def reserve(self, jobs: int) -> bool:
        """Takes `jobs` slots, all or none. Returns whether it took them."""
        with self._filled:
            if not self.has_room(jobs):
                return False
            self._reserved += jobs
            self._in_flight += jobs
            return True

    def put(self, jobs: Iterable[QueuedJob]) -> None:
        """Queues jobs; the caller has reserved their slots."""
        with self._filled:
            for queued in jobs:
                queued.sequence = next(self._sequences)
                self._waiting.setdefault(queued.job.key, OrderedDict())[queued.sequence] = queued
                self._reserved -= 1
                self._queued += 1
            self._filled.notify()

    def cancel(self, queued: QueuedJob) -> bool:
        """Removes a waiting job. Returns False if it is in a batch or gone already."""
        with self._filled:
            group = self._waiting.get(queued.job.key)
            if group is None or group.pop(queued.sequence, None) is None:
                return False
            self._count_removed(queued.job.key, group, 1)
            return True

    def replace(self, queued: QueuedJob, job: Job, encode: Callable[[RawImage], bytes]) -> bool:
        """Replaces a waiting job at its position. Returns False if it is in a batch or gone already."""
        with self._filled:
            key = queued.job.key
            group = self._waiting.get(key)
            if group is None or queued.sequence not in group:
                return False
            if job.key != key:
                del group[queued.sequence]
                if not group:
                    del self._waiting[key]
                joined = self._waiting.get(job.key, {}) | {queued.sequence: queued}
                self._waiting[job.key] = OrderedDict(sorted(joined.items()))
            queued.job, queued.encode = job, encode
            return True

    def release(self, *, unused: int, jobs: int) -> None:
        """Frees `jobs` slots, `unused` of which never queued a job."""
        with self._filled:
            self._reserved -= unused
            self._in_flight -= jobs

    def take(self, largest: Callable[[BatchKey], int]) -> tuple[list[QueuedJob], list[QueuedJob]] | None:
        """Blocks until jobs wait, then takes those with the oldest job's key, oldest first, up to largest(key).

        Returns the batch and the expired jobs found on the way. Both are empty after `wake` alone.
        Returns None once the queue is closed and empty.
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
                _, queued = group.popitem(last=False)
                (expired if queued.deadline <= now else batch).append(queued)
            self._count_removed(key, group, len(batch) + len(expired))
            return batch, expired

    def clear(self) -> list[QueuedJob]:
        """Removes and returns all waiting jobs."""
        with self._filled:
            jobs = [queued for group in self._waiting.values() for queued in group.values()]
            self._waiting.clear()
            self._queued = 0
            return jobs

    def close(self) -> None:
        """Makes `take` return None once nothing waits."""
        with self._filled:
            self._closed = True
            self._filled.notify_all()

    def wake(self) -> None:
        """Makes a blocked `take` return without jobs."""
        with self._filled:
            self._woken = True
            self._filled.notify_all()

    def _count_removed(self, key: BatchKey, group: OrderedDict[int, QueuedJob], jobs: int) -> None:
        self._queued -= jobs
        if not group:
            del self._waiting[key]
