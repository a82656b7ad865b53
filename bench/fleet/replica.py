"""A simulated server: the server's own queue in front of a table of engine seconds.

server.generation.job_queue decides on admission, batches and deadlines; nothing here does.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from bench.fleet.stages import BatchSeconds, Stages
from engines.types import BatchKey, Job, RawImage
from server.generation.job_queue import JobQueue, QueuedJob

NO_FUTURE = cast("asyncio.Future[object]", None)  # the queue never uses the future of an entry


def _encode_nothing(_: RawImage) -> bytes:
    return b""


@dataclass(frozen=True, slots=True)
class Limits:
    """The server settings that matter to the queue."""

    max_batch: int = 8
    max_queue: int = 128
    timeout_s: float = 30.0
    codec_threads: int = 2


@dataclass(eq=False, slots=True)
class Request(QueuedJob):
    """A queue entry. `arrived`: first sent by its client. `client`: of a closed loop or a connection."""

    arrived: float = 0.0
    attempts: int = 0
    client: int = 0


@dataclass(frozen=True, slots=True)
class StartedBatch:
    """A batch: the time at which the engine is free again, and each response with its time."""

    free: float
    completions: list[tuple[float, Request]]


class Replica:
    """One card. `busy_s`: seconds the engine ran. `late`: jobs past their deadline. `answered`: called for each
    response."""

    def __init__(
        self,
        limits: Limits,
        table: Mapping[BatchKey, list[BatchSeconds]],
        stages: Stages,
        clock: Callable[[], float],
        answered: Callable[[float, Request], None],
    ) -> None:
        self.queue = JobQueue.for_engine(max_queue=limits.max_queue, max_batch=limits.max_batch, clock=clock)
        self.busy = self.failed = False
        self.busy_s = 0.0
        self.late = 0
        self._limits, self._table, self._answered = limits, table, answered
        self._encode_s, self._http_s = stages.encode_s, stages.http_s
        self._codecs = [0.0] * limits.codec_threads
        self._answers: list[tuple[float, int, Request]] = []  # a heap of the jobs in batches, by response time
        self._due: deque[Request] = deque()  # queued jobs, oldest deadline first

    def advance(self, now: float) -> None:
        """Frees the slots of jobs answered by `now`, and of those that waited until their deadline.

        A server does so when a reservation ends, and by its timer.
        """
        completions, due, done, late = self._answers, self._due, 0, 0
        while completions and completions[0][0] <= now:
            at, _, request = heapq.heappop(completions)
            self._answered(at, request)
            done += 1
        while due and due[0].deadline <= now:
            late += self.queue.cancel(due.popleft())
        if done or late:
            self.queue.release(unused=0, jobs=done + late)
            self.late += late

    def submit(self, request: Request, now: float) -> bool:
        """Queues the request, or returns False where the server answers 429."""
        if not self.queue.reserve(1):
            return False
        request.submitted = now
        request.deadline = request.arrived + self._limits.timeout_s
        self._due.append(request)
        self.queue.put((request,))
        return True

    def start_batch(self, now: float) -> StartedBatch:
        """Starts a batch of waiting jobs."""
        next_batch = self.queue.take(self._largest)
        assert next_batch is not None, "the queue of a simulation is never closed"
        batch, late = next_batch
        if late:
            self.queue.release(unused=0, jobs=len(late))
            self.late += len(late)
        if not batch:
            return StartedBatch(now, [])
        times = self._table[batch[0].job.key][len(batch)]
        done, completions = now + times.before, []
        for entry in batch:
            done += times.each
            assert isinstance(entry, Request)
            at = self._encoded(done) + self._http_s
            heapq.heappush(self._answers, (at, entry.sequence, entry))
            completions.append((at, entry))
        self.busy = True
        self.busy_s += done - now
        return StartedBatch(done, completions)

    def _largest(self, _: BatchKey) -> int:
        return self._limits.max_batch

    def _encoded(self, done: float) -> float:
        """Returns when the file is ready, on the codec thread that is free first."""
        if not self._encode_s:
            return done
        ready = max(done, self._codecs[0]) + self._encode_s
        heapq.heapreplace(self._codecs, ready)
        return ready

    def fail(self) -> list[Request]:
        """Returns the requests in flight when the process died."""
        inside = [request for _, _, request in self._answers]
        inside += [entry for entry in self.queue.clear() if isinstance(entry, Request)]
        self._answers.clear()
        self._due.clear()
        self.failed = True
        return inside


def request(job: Job, arrived: float, client: int = 0, attempts: int = 0) -> Request:
    return Request(job, _encode_nothing, NO_FUTURE, 0.0, arrived, arrived=arrived, client=client, attempts=attempts)
