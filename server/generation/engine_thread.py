"""The one thread that calls the engine: load, warm up, then batch after batch until the queue closes. Between two of
them a better engine may take the place of the one that serves.

Contains the engine's faults. A batch that fails, be it of one job, is run again job by job, so that a poisonous job
fails alone and a failure that passes is seen by nobody; a batch that does not fit into memory halves the largest batch
of its key; an engine that keeps failing has to make a picture of its own before it is trusted again. Knows no event
loop: what happens is told to a Listener, on this thread.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.errors import JobError, OutOfMemoryError, OutputError, SprintError
from engines.types import BatchKey, Deliver, Engine, Job, RawImage
from server.errors import EXIT_ENGINE, EXIT_START, EngineError, InvalidError, RequestError
from server.generation.engine_source import EngineSource
from server.generation.job_queue import Entry, JobQueue
from server.telemetry.metrics import Metrics

FAILURES_IN_A_ROW = 3  # jobs failed alone, without a success between, before the engine must prove itself

logger = logging.getLogger("server.generation")


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's picture, and the seconds it waited for its batch."""

    image: RawImage
    queue_s: float


Outcome = Finished | RequestError


class Listener(Protocol):
    """Who is told; every call comes from the engine's thread."""

    def on_ready(self, engine: Engine) -> None: ...

    def on_outcomes(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None: ...

    def on_expired(self, entries: Sequence[Entry]) -> None: ...

    def on_engine_lost(self, exit_code: int, reason: str) -> None: ...


class EngineThread:
    """`running_since` is when the call of the engine that is under way began (time.monotonic()), for a watchdog."""

    def __init__(
        self,
        source: EngineSource,
        queue: JobQueue,
        listener: Listener,
        metrics: Metrics,
        *,
        max_batch: int,
    ) -> None:
        self._source = source
        self._queue = queue
        self._listener = listener
        self._metrics = metrics
        self._asked_batch = self._max_batch = max_batch
        self._reduced: dict[BatchKey, int] = {}  # keys that ran out of memory -> their largest batch since
        self._failures = 0
        self._seconds_per_job = 0.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.running_since: float | None = None

    @property
    def seconds_per_job(self) -> float:
        """Moving average over the last batches; 0 before the first."""
        return self._seconds_per_job

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread to end; False where it has not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            began = time.monotonic()
            engine = self._source.load(self._queue.wake)
            loaded = time.monotonic()
            engine.warmup()
            warm = time.monotonic()
            engine.info.start_s.update({"load": round(loaded - began, 3), "warm-up": round(warm - loaded, 3)})
        except BaseException as error:  # told to the listener, who ends the process
            remedy = "; a smaller --max-batch may fit" if isinstance(error, OutOfMemoryError) else ""
            expected = isinstance(error, SprintError)  # says in one line what to do
            logger.critical("cannot start: %s%s", error, remedy, exc_info=None if expected else error)
            self._listener.on_engine_lost(EXIT_START, "the engine could not be loaded and warmed up")
            return
        self._trust(engine)
        try:
            while (taken := self._queue.take(self._largest)) is not None:
                batch, expired = taken
                if expired:
                    self._listener.on_expired(expired)
                self._run(engine, batch)
                if (better := self._source.replacement()) is not None:
                    engine.close()
                    engine = better
                    self._trust(engine)
        except BaseException as error:  # told to the listener, who ends the process
            logger.critical("the engine's thread died", exc_info=error)
            self._listener.on_engine_lost(EXIT_ENGINE, f"the engine's thread died: {error!r}")
            return
        engine.close()

    def _trust(self, engine: Engine) -> None:
        """From here on this engine, which is warm, takes the batches."""
        self._max_batch = min(self._asked_batch, engine.limits.max_batch)
        self._reduced.clear()
        self._listener.on_ready(engine)

    def _largest(self, key: BatchKey) -> int:
        return self._reduced.get(key, self._max_batch)

    def _run(self, engine: Engine, batch: Sequence[Entry], *, again: bool = False) -> None:
        """Runs the jobs whose requests still want them; every one of them gets its outcome. `again`: the last time."""
        batch = [entry for entry in batch if not entry.future.done()]
        if not batch:
            return
        began = time.monotonic()
        told: set[int] = set()

        def tell(index: int, image: RawImage) -> None:
            """Each image as soon as it is done, while the engine makes the next."""
            entry = batch[index]
            if image.file is None and entry.job.image is None and not image.pixels.any():  # of a black image, black
                raise OutputError(f"the picture of seed {entry.job.seed} in a batch of {len(batch)} is all black")
            told.add(index)
            self._failures = 0
            self._listener.on_outcomes([(entry, Finished(image, began - entry.submitted))])

        try:
            images = self._generate(engine, [entry.job for entry in batch], began, tell)
            for index in set(range(len(batch))) - told:
                tell(index, images[index])
        except OutOfMemoryError as error:
            self._after_out_of_memory(engine, _rest(batch, told), error)
        except Exception as error:
            self._after_failure(engine, _rest(batch, told), error, again=again)

    def _generate(self, engine: Engine, jobs: Sequence[Job], began: float, tell: Deliver) -> list[RawImage]:
        self._metrics.running.set(len(jobs))
        self.running_since = began
        try:
            images = engine.generate(jobs, tell)
        finally:
            self.running_since = None
            self._metrics.running.set(0)
        if len(images) != len(jobs):
            raise OutputError(f"the engine made {len(images)} pictures of {len(jobs)} jobs")
        seconds = (time.monotonic() - began) / len(jobs)
        self._seconds_per_job += (seconds - self._seconds_per_job) * (0.2 if self._seconds_per_job else 1.0)
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.padding.inc(max(images[0].bucket - len(jobs), 0))
        self._metrics.cuda_graph_misses.inc(images[0].uncaptured)
        return images

    def _after_out_of_memory(self, engine: Engine, batch: Sequence[Entry], error: Exception) -> None:
        self._metrics.engine_failures.labels("out_of_memory").inc()
        if len(batch) == 1:
            self._fail(engine, batch[0], "the engine has no memory for this job even alone", error)
            return
        key = batch[0].job.key
        half = 1 << (len(batch) - 1).bit_length() >> 1  # of the bucket that ran
        self._reduced[key] = half
        logger.warning("out of memory in a batch of %d at %s; from now on at most %d", len(batch), key, half)
        while batch:
            largest = self._largest(key)  # less still, if the first half does not fit either
            self._run(engine, batch[:largest])
            batch = batch[largest:]

    def _after_failure(self, engine: Engine, batch: Sequence[Entry], error: Exception, *, again: bool) -> None:
        self._metrics.engine_failures.labels("output" if isinstance(error, OutputError) else "error").inc()
        if isinstance(error, JobError) and len(batch) == 1:
            self._listener.on_outcomes([(batch[0], InvalidError.from_job_error(error))])
        elif not again:
            logger.warning("a batch of %d failed (%s); running its jobs alone", len(batch), type(error).__name__)
            for entry in batch:
                self._run(engine, [entry], again=True)
        elif isinstance(error, OutputError):
            self._fail(engine, batch[0], "the engine's output is no picture", error)
        else:
            self._fail(engine, batch[0], "the engine failed on this job", error)

    def _fail(self, engine: Engine, entry: Entry, detail: str, error: Exception) -> None:
        logger.error("%s: %s", detail, entry.job.key, exc_info=error)
        self._listener.on_outcomes([(entry, EngineError(f"{detail}; other jobs go on"))])
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            self._failures = 0
            self._prove(engine)

    def _prove(self, engine: Engine) -> None:
        """Makes a picture that no client chose. An engine that fails on it as well is broken: RuntimeError.

        A device that has failed (a lost GPU, an illegal address) fails every call until the process is new; but a
        prompt that makes a good engine fail must not be able to restart it.
        """
        width, height = engine.limits.default_size
        if "text" not in engine.limits.conditioning:
            return
        job = Job("a red circle", seed=0, width=width, height=height, steps=engine.limits.steps[0])
        try:
            self._generate(engine, [job], time.monotonic(), lambda _index, _image: None)
        except Exception as error:
            raise RuntimeError(f"the engine fails on its own job too: {error!r}") from error


def _rest(batch: Sequence[Entry], told: set[int]) -> list[Entry]:
    """Those whose image was not told."""
    return [entry for index, entry in enumerate(batch) if index not in told]
