"""Between requests and the engine: admission, deadlines, and the state of the service.

There is no timer that waits for a batch to fill. The engine's thread takes whatever waits with the oldest job's batch
key, up to the largest batch, the moment it is free: the next batch is ready as soon as its first job is, and goes on
filling until it starts. Everything in this file happens on the event loop.
(as in huggingface/text-embeddings-inference `core/src/queue.rs`: one owner of the queue, permits that answer 429)
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
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
from server.generation.job_queue import Entry, JobQueue
from server.telemetry.metrics import Metrics

State = Literal["loading", "ready", "draining", "hung", "failed"]

CLOSE_S = 1.0  # what the engine gets at least, at the end, to finish a batch and close
BUILD_RETRY_S = 30  # at most until a client asks again while an engine is built
EXIT_GRACE_S = 1.0  # between saying that the engine is lost, to everyone who waits, and leaving

logger = logging.getLogger("server.generation")


class Scheduler:
    """Takes jobs in, hands pictures out.

    `when_ready` hears of each engine once it is warm; `leave` is called with an exit code when the engine is lost.
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
        self._hang_limit_s = batch_timeout_s
        self._drain_limit_s = shutdown_timeout_s
        self._drain_ends: float | None = None
        self._leave = leave
        self._when_ready = when_ready
        self._queue = JobQueue.for_engine(max_queue=max_queue, max_batch=max_batch)
        self._thread = EngineThread(source, self._queue, ResultDelivery(self, codec), metrics, max_batch=max_batch)
        self._engine: Engine | None = None
        self._unanswered: set[Entry] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.ready = asyncio.Event()  # loaded and warm, once and for good
        self._watchdog: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.state: State = "loading"
        metrics.waiting.set_function(lambda: self._queue.waiting)

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to load the engine; returns at once. `state` becomes ready after warm-up."""
        self.loop = asyncio.get_running_loop()
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch(), name="engine watchdog")

    def begin_drain(self) -> None:
        """Refuses new jobs with 503 from now on; those accepted go on, until the drain limit."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
        if self._drain_ends is None:
            self._drain_ends = time.monotonic() + self._drain_limit_s

    @property
    def drain_left_s(self) -> float:
        """Seconds until the drain limit; the whole limit while no drain has begun."""
        return self._drain_limit_s if self._drain_ends is None else max(0.0, self._drain_ends - time.monotonic())

    async def drain(self) -> None:
        """Waits until all accepted jobs are answered; at the drain limit, drops those that still wait."""
        self.begin_drain()
        if self._idle.is_set():
            return
        try:
            await asyncio.wait_for(self._idle.wait(), self.drain_left_s)
        except TimeoutError:
            left = self._queue.clear()
            logger.warning("drain limit reached: %d jobs dropped that had not begun", len(left))
            self._metrics.dropped.labels("draining").inc(len(left))
            _fail(left, self._unavailable)

    async def close(self) -> None:
        """Drains, ends a build, the engine's thread and the engine."""
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
        """The engine that is being built, while another one serves or none."""
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
        """Whole seconds in which what is inside now will have run, by the measured time per job; at least 1."""
        return max(1, math.ceil(self._thread.seconds_per_job * self._queue.in_flight))

    def check_ready(self) -> None:
        """Raises UnavailableError (503) unless jobs are taken."""
        if self.state != "ready":
            raise self._unavailable()

    def check_open(self, jobs: int = 1) -> None:
        """Raises what `reserve` would, before anything is spent on a request (reading its body, for one)."""
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
        """Slots for `jobs` jobs that must begin before `deadline` (time.monotonic()), all or none.

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
            "draining": ("draining", "the server is shutting down; ask another one, or this one once it is back", 5),
            "hung": ("engine_hung", "the engine does not answer; the server is about to restart", 10),
            "failed": ("engine_lost", "the engine is lost; the server is about to restart", 10),
        }
        code, detail, retry_after_s = reasons[self.state]
        building = self._source.building() if code == "not_ready" else None
        if building is None:
            return UnavailableError(detail, code=code, retry_after_s=retry_after_s)
        return UnavailableError(
            f"the engine is being built: {building.words}",
            code=code,
            retry_after_s=max(retry_after_s, min(BUILD_RETRY_S, math.ceil(building.seconds_left or 0))),
            building=building.to_dict(),
        )

    # --- what reservations and the engine's thread tell -------------------------------------------------------------

    def register(self, entry: Entry) -> None:
        self._unanswered.add(entry)
        entry.future.add_done_callback(lambda _: self._unanswered.discard(entry))

    def on_release(self) -> None:
        """A request gave its slots back."""
        if not self._queue.in_flight:
            self._idle.set()

    def on_ready(self, engine: Engine) -> None:
        self._engine = engine
        self._when_ready(engine)
        self.ready.set()
        if self.state == "loading":
            self.state = "ready"

    def on_results(self, outcomes: Sequence[tuple[Entry, EncodedResult | Exception]]) -> None:
        for entry, outcome in outcomes:
            if not entry.future.done():
                if isinstance(outcome, EncodedResult):
                    entry.future.set_result(outcome)
                else:
                    entry.future.set_exception(outcome)
            if isinstance(outcome, EncodedResult):
                self._count(entry.job, outcome)

    def on_expired(self, entries: Sequence[Entry]) -> None:
        self._metrics.dropped.labels("deadline").inc(len(entries))
        _fail(entries, deadline_passed)

    def failed(self, exit_code: int, reason: str) -> None:
        self.on_engine_lost("failed", exit_code, reason)

    def on_engine_lost(self, state: Literal["hung", "failed"], exit_code: int, reason: str) -> None:
        """The engine is gone for good: answers everyone, then leaves."""
        logger.critical("leaving with exit code %d: %s", exit_code, reason)
        self.state = state
        _fail(self._queue.clear(), self._unavailable)
        unmade = [entry for entry in self._unanswered if not entry.made]
        _fail(unmade, lambda: EngineError(f"{reason}; the server is about to restart"))
        grace_s = EXIT_GRACE_S if self._engine is not None else 0.0  # nothing was accepted before it was ready
        asyncio.get_running_loop().call_later(grace_s, self._leave, exit_code)

    def _count(self, job: Job, made: EncodedResult) -> None:
        metrics, image, stages = self._metrics, made.finished.image, made.finished.image.stages
        metrics.count_image(job.width, job.height, job.steps)
        (metrics.cache_hits if image.prompt_cached else metrics.cache_misses).inc()
        metrics.stages["queue"].observe(made.finished.queue_s)
        metrics.stages["text"].observe(stages.text)
        metrics.stages["denoise"].observe(stages.denoise)
        metrics.stages["decode"].observe(stages.decode)
        if made.content:
            metrics.stages["encode"].observe(made.encode_s)

    async def _watch(self) -> None:
        """Notices a call of the engine that does not end."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_limit_s / 4))
            since = self._thread.running_since
            if since is not None and time.monotonic() - since > self._hang_limit_s:
                self._metrics.engine_failures.labels("hang").inc()
                self.on_engine_lost("hung", EXIT_HANG, f"a batch ran longer than {self._hang_limit_s:g} s")
                return


class Reservation:
    """Slots in the queue, given back when the `with` block ends; jobs that have not begun by then are dropped."""

    def __init__(self, scheduler: Scheduler, queue: JobQueue, metrics: Metrics, jobs: int, deadline: float) -> None:
        self._scheduler = scheduler
        self._queue = queue
        self._metrics = metrics
        self._jobs = jobs
        self._unused = jobs
        self._deadline = deadline
        self._entries: list[Entry] = []
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, jobs: Sequence[Job], encode: Callable[[RawImage], bytes]) -> list[asyncio.Future[EncodedResult]]:
        """Queues as many jobs as were reserved. Each future ends with the encoded picture or with a RequestError."""
        loop = asyncio.get_running_loop()
        self._entries = [Entry(job, encode, loop.create_future(), self._deadline) for job in jobs]
        for entry in self._entries:
            self._scheduler.register(entry)
        self._queue.put(self._entries)
        self._unused -= len(self._entries)
        self._timer = loop.call_later(self._deadline - time.monotonic(), self._expire)
        return [entry.future for entry in self._entries]

    def replace(self, job: Job, encode: Callable[[RawImage], bytes]) -> bool:
        """Makes the one job of this reservation another one; False where it is in a batch already."""
        (entry,) = self._entries
        return self._queue.replace(entry, job, encode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        withdrawn = sum(self._queue.withdraw(entry) for entry in self._entries)
        for entry in self._entries:
            entry.future.cancel()
        if isinstance(error, asyncio.CancelledError | ClientGoneError):
            self._metrics.dropped.labels("client_gone").inc(withdrawn + self._unused)
        elif isinstance(error, DeadlineError):
            self._metrics.dropped.labels("deadline").inc(withdrawn + self._unused)
        self._queue.release(unused=self._unused, jobs=self._jobs)
        self._scheduler.on_release()

    def _expire(self) -> None:
        self._scheduler.on_expired([entry for entry in self._entries if self._queue.withdraw(entry)])


def deadline_passed() -> DeadlineError:
    return DeadlineError(
        "the deadline passed before the job could begin; it was not run (timeout_ms sets the deadline)"
    )


def _fail(entries: Iterable[Entry], make: Callable[[], RequestError]) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(make())
