"""The one thread that calls the engine: it loads the engine, warms it up, and runs batches until the queue closes.

Between two batches it may switch to a better engine. It contains the engine's failures:

- It retries a failed batch job by job: transient failures are hidden, a job that always fails gets 500 alone.
- On out-of-memory it halves the largest batch of that batch key.
- An engine that keeps failing must pass a health check, otherwise the process exits.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from engines.errors import JobError, OutOfMemoryError, OutputError, SprintError
from engines.types import BatchKey, Deliver, Engine, Job, RawImage
from server.errors import EXIT_ENGINE, EXIT_SETTINGS, EXIT_START, EngineError, InvalidError, SettingsError
from server.generation.delivery import ResultDelivery
from server.generation.engine_source import EngineSource
from server.generation.job_queue import JobQueue, QueuedJob
from server.generation.model_engines import engines_by_name
from server.telemetry.metrics import Metrics

FAILURES_IN_A_ROW = 3  # jobs that failed alone, without a success between, before the health check

logger = logging.getLogger("server.generation")


class EngineThread:
    """`running_since` is the start of the current engine call (time.monotonic()), for a watchdog."""

    def __init__(
        self, source: EngineSource, queue: JobQueue, delivery: ResultDelivery, metrics: Metrics, *, max_batch: int
    ) -> None:
        self._source = source
        self._queue = queue
        self._delivery = delivery
        self._metrics = metrics
        self._requested_batch = max_batch
        self._max_batch: dict[str, int] = {}  # Job.model -> largest batch of its engine
        self._reduced: dict[BatchKey, int] = {}  # keys that ran out of memory -> their largest batch since
        self._failures: Counter[str] = Counter()  # Job.model -> jobs that failed since its last success
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
        """Waits for the thread to end. Returns False if it has not."""
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
        except BaseException as error:  # the scheduler ends the process
            remedy = "; a smaller --max-batch may fit" if isinstance(error, OutOfMemoryError) else ""
            expected = isinstance(error, SprintError)  # says in one line what to do
            logger.critical("cannot start: %s%s", error, remedy, exc_info=None if expected else error)
            exit_code = EXIT_SETTINGS if isinstance(error, SettingsError) else EXIT_START
            self._delivery.engine_lost(exit_code, "the engine could not be loaded and warmed up")
            return
        self._serve(engine)
        try:
            while (taken := self._queue.take(self._largest)) is not None:
                batch, expired = taken
                if expired:
                    self._delivery.expired(expired)
                self._run(engine, batch)
                if (better := self._source.replacement()) is not None:
                    engine.close()
                    engine = better
                    self._serve(engine)
        except BaseException as error:  # the scheduler ends the process
            logger.critical("the engine's thread died", exc_info=error)
            self._delivery.engine_lost(EXIT_ENGINE, f"the engine's thread died: {error!r}")
            return
        engine.close()

    def _serve(self, engine: Engine) -> None:
        """Sends the next batches to this warm engine."""
        engines = {"": engine, **engines_by_name(engine)}
        self._max_batch = {name: min(self._requested_batch, one.limits.max_batch) for name, one in engines.items()}
        self._reduced.clear()
        self._delivery.ready(engine)

    def _largest(self, key: BatchKey) -> int:
        return self._reduced.get(key) or self._max_batch[key.model]

    def _run(self, engine: Engine, batch: Sequence[QueuedJob], *, retry: bool = False) -> None:
        """Runs the jobs whose requests still wait; each gets a result. `retry`: this is a job's last attempt, alone."""
        batch = [job for job in batch if not job.future.done()]
        if not batch:
            return
        began = time.monotonic()
        delivered: set[int] = set()

        def deliver(index: int, image: RawImage) -> None:
            """Delivers each image as soon as it is done, while the engine makes the next."""
            queued = batch[index]
            if image.file is None and queued.job.image is None and not image.pixels.any():  # of a black image, black
                raise OutputError(f"the image of seed {queued.job.seed} in a batch of {len(batch)} is all black")
            if not delivered:
                self._count_batch(batch, image)
            delivered.add(index)
            del self._failures[queued.job.model]
            self._delivery.image(queued, image, began - queued.submitted)

        try:
            images = self._generate(engine, [queued.job for queued in batch], began, deliver)
            for index in set(range(len(batch))) - delivered:
                deliver(index, images[index])
        except OutOfMemoryError as error:
            self._after_out_of_memory(engine, _undelivered(batch, delivered), error)
        except Exception as error:
            self._after_failure(engine, _undelivered(batch, delivered), error, retry=retry)

    def _generate(self, engine: Engine, jobs: Sequence[Job], began: float, deliver: Deliver) -> list[RawImage]:
        self._metrics.running.set(len(jobs))
        self.running_since = began
        try:
            images = engine.generate(jobs, deliver)
        finally:
            self.running_since = None
            self._metrics.running.set(0)
        if len(images) != len(jobs):
            raise OutputError(f"the engine made {len(images)} images of {len(jobs)} jobs")
        seconds = (time.monotonic() - began) / len(jobs)
        self._seconds_per_job += (seconds - self._seconds_per_job) * (0.2 if self._seconds_per_job else 1.0)
        return images

    def _count_batch(self, batch: Sequence[QueuedJob], first: RawImage) -> None:
        """Counts a batch by its first image, so that who has an answer finds its batch in the metrics."""
        self._metrics.observe_batch(len(batch), batch[0].job.model)
        self._metrics.padding.inc(max(first.bucket - len(batch), 0))
        self._metrics.cuda_graph_misses.inc(first.uncaptured)

    def _after_out_of_memory(self, engine: Engine, batch: Sequence[QueuedJob], error: Exception) -> None:
        self._metrics.engine_failures.labels("out_of_memory").inc()
        if len(batch) == 1:
            self._fail(engine, batch[0], "the engine has no memory for this job even alone", error)
            return
        key = batch[0].job.key
        half = 1 << (len(batch) - 1).bit_length() >> 1  # of the bucket that ran
        self._reduced[key] = half
        logger.warning("out of memory in a batch of %d at %s; from now on at most %d", len(batch), key, half)
        while batch:
            largest = self._largest(key)  # the first half may have reduced it again
            self._run(engine, batch[:largest])
            batch = batch[largest:]

    def _after_failure(self, engine: Engine, batch: Sequence[QueuedJob], error: Exception, *, retry: bool) -> None:
        self._metrics.engine_failures.labels("output" if isinstance(error, OutputError) else "error").inc()
        if isinstance(error, JobError) and len(batch) == 1:
            self._delivery.error(batch[0], InvalidError.from_job_error(error))
        elif not retry:
            logger.warning("a batch of %d failed (%s); running its jobs alone", len(batch), type(error).__name__)
            for queued in batch:
                self._run(engine, [queued], retry=True)
        elif isinstance(error, OutputError):
            self._fail(engine, batch[0], "the engine's output is no image", error)
        else:
            self._fail(engine, batch[0], "the engine failed on this job", error)

    def _fail(self, engine: Engine, queued: QueuedJob, detail: str, error: Exception) -> None:
        logger.error("%s: %s", detail, queued.job.key, exc_info=error)
        self._delivery.error(queued, EngineError(f"{detail}; other jobs go on"))
        self._failures[queued.job.model] += 1
        if self._failures[queued.job.model] >= FAILURES_IN_A_ROW:
            del self._failures[queued.job.model]
            self._health_check(engine, queued.job.model)

    def _health_check(self, engine: Engine, model: str) -> None:
        """Runs a job of this model that no client chose. Raises RuntimeError if the engine fails on it too.

        After a device failure (a lost GPU, an illegal address) every call fails until the process restarts. A prompt
        that makes a good engine fail must not cause that restart.
        """
        limits = engines_by_name(engine)[model].limits if model else engine.limits
        width, height = limits.default_size
        if "text" not in limits.conditioning:
            return
        job = Job("a red circle", seed=0, width=width, height=height, steps=limits.steps[0], model=model)
        try:
            self._generate(engine, [job], time.monotonic(), lambda _index, _image: None)
        except Exception as error:
            raise RuntimeError(f"the engine fails on its own job too: {error!r}") from error


def _undelivered(batch: Sequence[QueuedJob], delivered: set[int]) -> list[QueuedJob]:
    return [queued for index, queued in enumerate(batch) if index not in delivered]
