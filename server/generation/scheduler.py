"""Admission, deadlines and the state of the service. All of it runs on the event loop.

No timer waits for a batch to fill. As soon as the engine's thread is free, it takes the waiting jobs with the oldest
job's batch key, up to the largest batch. A batch fills until it starts.
(as in huggingface/text-embeddings-inference `core/src/queue.rs`: one owner of the queue, permits that answer 429)
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

from engines.types import Engine, Job, RawImage
from server.errors import (
    EXIT_HANG,
    ClientGoneError,
    DeadlineError,
    EngineError,
    QueueFullError,
    RequestError,
    UnavailableError,
)
from server.generation.delivery import EncodedResult, ResultDelivery
from server.generation.engine_source import Building, EngineSource
from server.generation.engine_thread import EngineThread
from server.generation.image_codec import Codec
from server.generation.job_queue import JobQueue, QueuedJob
from server.telemetry.metrics import Metrics

State = Literal["loading", "ready", "draining", "hung", "failed"]

CLOSE_S = 1.0  # least time for the engine to finish a batch and close
BUILD_RETRY_S = 30  # longest Retry-After while an engine is built
EXIT_GRACE_S = 1.0  # for answers to reach their clients before the process exits

logger = logging.getLogger("server.generation")


class Scheduler:
    """Admits jobs and hands out their results.

    It calls `when_ready` with each warm engine, and `leave` with an exit code when the engine is lost.
    """

    def __init__(
        self,
        source: EngineSource,
        codec: Codec,
        *,
        max_batch: int,
        max_queue: int,
        batch_timeout_s: float,
        shutdown_timeout_s: float,
        metrics: Metrics,
        leave: Callable[[int], None],
        when_ready: Callable[[Engine], None],
    ) -> None:
        self._metrics = metrics
        self._source = source
        self._batch_timeout_s = batch_timeout_s
        self._shutdown_timeout_s = shutdown_timeout_s
        self._drain_ends: float | None = None
        self._leave = leave
        self._when_ready = when_ready
        self._queue = JobQueue.for_engine(max_queue=max_queue, max_batch=max_batch)
        self._delivery = ResultDelivery(
            codec,
            on_ready=self._on_ready,
            on_result=self._on_result,
            on_expired=self.on_expired,
            on_engine_lost=self._on_engine_lost,
        )
        self._thread = EngineThread(source, self._queue, self._delivery, metrics, max_batch=max_batch)
        self._engine: Engine | None = None
        self._unanswered: set[QueuedJob] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.ready = asyncio.Event()  # set once the first engine is warm, and never cleared
        self._watchdog: asyncio.Task[None] | None = None
        self.state: State = "loading"
        metrics.waiting.set_function(lambda: self._queue.waiting)

    # --- life -----------------------------------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop; None before `start`."""
        return self._delivery.loop

    async def start(self) -> None:
        """Starts loading the engine and returns at once. `state` becomes ready after warm-up."""
        self._delivery.loop = asyncio.get_running_loop()
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch(), name="engine watchdog")

    def begin_drain(self) -> None:
        """Refuses new jobs with 503 from now on. Accepted jobs go on until the shutdown timeout."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
        if self._drain_ends is None:
            self._drain_ends = time.monotonic() + self._shutdown_timeout_s

    @property
    def drain_left_s(self) -> float:
        """Seconds until the shutdown timeout; all of it while no drain has begun."""
        return self._shutdown_timeout_s if self._drain_ends is None else max(0.0, self._drain_ends - time.monotonic())

    async def drain(self) -> None:
        """Waits until all accepted jobs are answered. At the shutdown timeout, drops those that still wait."""
        self.begin_drain()
        if self._idle.is_set():
            return
        try:
            await asyncio.wait_for(self._idle.wait(), self.drain_left_s)
        except TimeoutError:
            left = self._queue.clear()
            logger.warning("shutdown timeout reached: %d jobs dropped that had not begun", len(left))
            self._metrics.dropped.labels("draining").inc(len(left))
            _fail(left, self._unavailable)

    async def close(self) -> None:
        """Drains, then ends a build, the engine's thread and the engine."""
        await self.drain()
        await asyncio.to_thread(self._source.close)
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._queue.close()
        if self._engine is not None and self.state not in ("hung", "failed"):
            ended = await asyncio.to_thread(self._thread.join, max(self.drain_left_s, CLOSE_S))
            if not ended:
                logger.error("the engine did not end its batch; leaving it behind")

    # --- admission ------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """Raises UnavailableError (503) unless the engine is loaded and warm."""
        if self._engine is None or self.state in ("hung", "failed"):
            raise self._unavailable()
        return self._engine

    @property
    def building(self) -> Building | None:
        """Progress of an engine build, whether or not another engine serves meanwhile."""
        return self._source.building()

    @property
    def waiting(self) -> int:
        """Jobs accepted and not in a batch yet."""
        return self._queue.waiting

    @property
    def in_flight(self) -> int:
        """Jobs accepted and not answered yet."""
        return self._queue.in_flight

    @property
    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, in which the jobs in flight will have run, by the measured time per job."""
        return max(1, math.ceil(self._thread.seconds_per_job * self._queue.in_flight))

    def check_ready(self) -> None:
        """Raises UnavailableError (503) unless the service accepts jobs."""
        if self.state != "ready":
            raise self._unavailable()

    def check_open(self, jobs: int = 1) -> None:
        """Raises as `reserve`, before a request costs anything, such as reading its body."""
        if self.state == "draining":
            self._metrics.dropped.labels("draining").inc(jobs)
        self.check_ready()
        if not self._queue.has_room(jobs):
            self._metrics.dropped.labels("queue_full").inc(jobs)
            raise QueueFullError(
                f"the queue is full: {self._queue.waiting} jobs wait of at most {self._queue.max_waiting}, "
                f"this request asks for {jobs}; try again after Retry-After seconds",
                self.retry_after_s,
            )

    def reserve(self, jobs: int, deadline: float) -> "Reservation":
        """Reserves slots for `jobs` jobs, all or none. They must begin before `deadline` (time.monotonic()).

        Raises QueueFullError (429) or UnavailableError (503), at once.
        """
        self.check_open(jobs)
        self._queue.reserve(jobs)
        self._idle.clear()
        return Reservation(self, self._queue, self._metrics, jobs, deadline)

    def _unavailable(self) -> UnavailableError:
        reasons: dict[State, tuple[str, str, int]] = {
            "loading": ("not_ready", "the engine is being loaded and warmed up", 2),
            "ready": ("not_ready", "the engine is being loaded and warmed up", 2),
            "draining": ("draining", "the server is shutting down; retry after Retry-After seconds", 5),
            "hung": ("engine_hung", "the engine does not answer; the server is about to restart", 10),
            "failed": ("engine_lost", "the engine is lost; the server is about to restart", 10),
        }
        code, detail, retry_after_s = reasons[self.state]
        building = self._source.building() if code == "not_ready" else None
        if building is None:
            return UnavailableError(detail, code=code, retry_after_s=retry_after_s)
        return UnavailableError(
            f"the engine is being built: {building.summary}",
            code=code,
            retry_after_s=max(retry_after_s, min(BUILD_RETRY_S, math.ceil(building.seconds_left or 0))),
            building=building.to_dict(),
        )

    # --- events of reservations and of the engine's thread ----------------------------------------------------------

    def register(self, job: QueuedJob) -> None:
        """Keeps the job until its future is done."""
        self._unanswered.add(job)
        job.future.add_done_callback(lambda _: self._unanswered.discard(job))

    def on_release(self) -> None:
        """Notes whether a request that freed its slots was the last one."""
        if not self._queue.in_flight:
            self._idle.set()

    def _on_ready(self, engine: Engine) -> None:
        self._engine = engine
        self._when_ready(engine)
        self.ready.set()
        if self.state == "loading":
            self.state = "ready"

    def _on_result(self, job: QueuedJob, result: EncodedResult | Exception) -> None:
        if not job.future.done():
            if isinstance(result, EncodedResult):
                job.future.set_result(result)
            else:
                job.future.set_exception(result)
        if isinstance(result, EncodedResult):
            self._metrics.bookkeeping.later(partial(self._count, job.job, result))

    def on_expired(self, jobs: Sequence[QueuedJob]) -> None:
        """Fails jobs whose deadline passed before they began."""
        self._metrics.dropped.labels("deadline").inc(len(jobs))
        _fail(jobs, deadline_passed)

    def _on_engine_lost(self, exit_code: int, reason: str) -> None:
        self._exit("failed", exit_code, reason)

    def _exit(self, state: Literal["hung", "failed"], exit_code: int, reason: str) -> None:
        """Answers all open requests, then ends the process."""
        logger.critical("leaving with exit code %d: %s", exit_code, reason)
        self.state = state
        _fail(self._queue.clear(), self._unavailable)
        lost = [job for job in self._unanswered if not job.has_pixels]
        _fail(lost, lambda: EngineError(f"{reason}; the server is about to restart"))
        grace_s = EXIT_GRACE_S if self._engine is not None else 0.0  # nothing was accepted before it was ready
        asyncio.get_running_loop().call_later(grace_s, self._end_process, exit_code)

    def _end_process(self, exit_code: int) -> None:
        self._metrics.bookkeeping.finish()
        self._leave(exit_code)

    def _count(self, job: Job, result: EncodedResult) -> None:
        metrics, image, stages = self._metrics, result.image, result.image.stages
        metrics.count_image(job.width, job.height, job.steps, job.model)
        (metrics.cache_hits if image.prompt_cached else metrics.cache_misses).inc()
        metrics.observe_stages({"queue": result.queue_s, "text": stages.text, "denoise": stages.denoise}, job.model)
        metrics.observe_stages({"decode": stages.decode}, job.model)
        if result.content:
            metrics.observe_stages({"encode": result.encode_s}, job.model)

    async def _watch(self) -> None:
        """Ends the process if a call of the engine takes longer than --batch-timeout-s."""
        while True:
            await asyncio.sleep(min(1.0, self._batch_timeout_s / 4))
            since = self._thread.running_since
            if since is not None and time.monotonic() - since > self._batch_timeout_s:
                self._metrics.engine_failures.labels("hang").inc()
                self._exit("hung", EXIT_HANG, f"a batch ran longer than {self._batch_timeout_s:g} s")
                return


class Reservation:
    """Slots in the queue. The end of the `with` block frees them and drops jobs that have not begun."""

    def __init__(self, scheduler: Scheduler, queue: JobQueue, metrics: Metrics, jobs: int, deadline: float) -> None:
        self._scheduler = scheduler
        self._queue = queue
        self._metrics = metrics
        self._jobs = jobs
        self._unused = jobs
        self._deadline = deadline
        self._queued: list[QueuedJob] = []
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, jobs: Sequence[Job], encode: Callable[[RawImage], bytes]) -> list[asyncio.Future[EncodedResult]]:
        """Queues the reserved number of jobs. Each future ends with an EncodedResult or a RequestError."""
        loop = asyncio.get_running_loop()
        self._queued = [QueuedJob(job, encode, loop.create_future(), self._deadline) for job in jobs]
        for queued in self._queued:
            self._scheduler.register(queued)
        self._queue.put(self._queued)
        self._unused -= len(self._queued)
        self._timer = loop.call_later(self._deadline - time.monotonic(), self._expire)
        return [queued.future for queued in self._queued]

    def replace(self, job: Job, encode: Callable[[RawImage], bytes]) -> bool:
        """Replaces the one job of this reservation. Returns False if it is in a batch already."""
        (queued,) = self._queued
        return self._queue.replace(queued, job, encode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        cancelled = sum(self._queue.cancel(job) for job in self._queued)
        for job in self._queued:
            job.future.cancel()
        if isinstance(error, asyncio.CancelledError | ClientGoneError):
            self._metrics.dropped.labels("client_gone").inc(cancelled + self._unused)
        elif isinstance(error, DeadlineError):
            self._metrics.dropped.labels("deadline").inc(cancelled + self._unused)
        self._queue.release(unused=self._unused, jobs=self._jobs)
        self._scheduler.on_release()

    def _expire(self) -> None:
        self._scheduler.on_expired([job for job in self._queued if self._queue.cancel(job)])


def deadline_passed() -> DeadlineError:
    return DeadlineError(
        "the deadline passed before the job could begin; it was not run (timeout_ms sets the deadline)"
    )


def _fail(jobs: Iterable[QueuedJob], make_error: Callable[[], RequestError]) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(make_error())
