"""Prometheus metrics, one registry per app.

Labels never hold a prompt, a seed or a request id. The number of series is bounded: if an engine runs any size, only
MAX_REQUESTED_SIZES of the requested ones get their own series. With several models, images, batches and stages have a
label `model`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.types import EngineInfo
from server.telemetry.bookkeeping import Bookkeeping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)
STAGES = ("queue", "text", "denoise", "decode", "encode")
MAX_REQUESTED_SIZES = 32  # sizes with their own series, besides the engine's; all further ones share OTHER_SIZE
OTHER_SIZE = ("other", "other")


class Metrics:
    """All metrics of one app; `exposition` returns them as text. models: names of the served models."""

    def __init__(
        self, *, request_buckets: Iterable[float], stage_buckets: Iterable[float], models: Sequence[str] = ()
    ) -> None:
        # Job.model -> values of the label `model`, which one model has none of
        self._model_labels: dict[str, tuple[str, ...]] = {"": ()}
        if len(models) > 1:
            self._model_labels = {name: (name,) for name in models}
        by_model = ("model",) if len(models) > 1 else ()
        request_bounds, stage_bounds = tuple(request_buckets), tuple(stage_buckets)
        self.bookkeeping = Bookkeeping()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("sana_sprint_requests", "Answered requests.", ("route", "status"))
        self.request_seconds = histogram(
            "sana_sprint_request_duration_seconds",
            "From the first byte of a request's head to the last byte of its answer.",
            ("route",),
            buckets=request_bounds,
        )
        self.stage_seconds = histogram(
            "sana_sprint_stage_duration_seconds",
            "Duration of a stage per job; text, denoise and decode are those of its batch.",
            ("stage", *by_model),
            buckets=stage_bounds,
        )
        self.batch_size = histogram("sana_sprint_batch_size", "Jobs in a batch.", by_model, buckets=BATCH_BUCKETS)
        self.padding = counter("sana_sprint_batch_padding", "Padded slots run for nothing.")
        self.cuda_graph_misses = counter(
            "sana_sprint_cuda_graph_misses", "Batches without a captured CUDA graph, of an engine that has some."
        )
        self.images = counter("sana_sprint_images", "Generated images.", ("width", "height", "steps", *by_model))
        self._sizes: dict[tuple[int, int], tuple[str, str]] = {}  # (width, height) -> labels
        self._max_sizes = MAX_REQUESTED_SIZES
        self.waiting = gauge("sana_sprint_jobs_waiting", "Accepted jobs that wait for a batch.")
        self.running = gauge("sana_sprint_jobs_running", "Jobs in the running batch.")
        self.dropped = counter("sana_sprint_jobs_dropped", "Jobs that never ran.", ("reason",))
        self.cache_hits = counter("sana_sprint_prompt_cache_hits", "Jobs whose prompt was encoded before.")
        self.cache_misses = counter("sana_sprint_prompt_cache_misses", "Jobs whose prompt had to be encoded.")
        self.engine_failures = counter(
            "sana_sprint_engine_failures",
            "Failed calls of the engine; a failed batch and each of its retried jobs count.",
            ("kind",),
        )
        self.origins_refused = counter(
            "sana_sprint_origins_refused", "Requests of pages of other sites, refused by their Origin.", ("kind",)
        )
        self.replaced_kernels = gauge(
            "sana_sprint_replaced_kernels",
            "1 for each kernel, CUDA graph or nvJPEG that is replaced on this GPU, with the reason.",
            ("kernel", "reason"),
        )
        self.workers_desired = gauge("sana_sprint_workers_desired", "Configured number of processes (--workers).")
        self.worker_ready = gauge(
            "sana_sprint_worker_ready", "1 if this process is ready; an ended process has no series."
        )
        self.build_progress = gauge(
            "sana_sprint_engine_build_progress", "Progress of the engine build from 0 to 1; 1 without a build."
        )
        self.build_seconds_left = gauge(
            "sana_sprint_engine_build_seconds_left", "Estimated seconds until the engine build ends; 0 without a build."
        )
        self._engine_info = Info("sana_sprint_engine", "What runs.", ("checkpoint",), registry=None)
        self._described = False
        self._memory: _GpuMemory | None = None
        self.live_sessions = gauge("sana_sprint_live_sessions", "Open live sessions.")
        self.live_ended = counter("sana_sprint_live_sessions_ended", "Live sessions that ended.", ("reason",))
        self.live_seconds = histogram(
            "sana_sprint_live_image_duration_seconds",
            "From receiving the newest drawing or setting of an image to sending the image.",
            buckets=request_bounds,
        )
        self.live_superseded = counter(
            "sana_sprint_live_drawings_superseded", "Drawings that a newer one replaced before they were run."
        )
        self.safety_checks = counter(
            "sana_sprint_safety_checks",
            "Checks of prompts and images; failed counts errors of a checker.",
            ("what", "verdict"),
        )
        self.safety_seconds = histogram(
            "sana_sprint_safety_check_duration_seconds", "Time of one check.", ("what",), buckets=stage_bounds
        )
        for reason in ("client", "idle", "slow", "draining", "too_many_sessions"):
            self.live_ended.labels(reason)
        for kind in ("request", "websocket"):
            self.origins_refused.labels(kind)
        for reason in ("client_gone", "deadline", "draining", "queue_full"):
            self.dropped.labels(reason)
        for kind in ("error", "out_of_memory", "output", "hang"):
            self.engine_failures.labels(kind)
        self._stages = {
            (name, stage): self.stage_seconds.labels(stage, *labels)
            for name, labels in self._model_labels.items()
            for stage in STAGES
        }
        self._batch_sizes = {
            name: self.batch_size.labels(*labels) if labels else self.batch_size
            for name, labels in self._model_labels.items()
        }

    def describe_engines(self, infos: Iterable[EngineInfo], version: str) -> None:
        """Publishes sana_sprint_engine_info and the replaced kernels; overwrites those of earlier engines.

        `version` is this package's.
        """
        self.replaced_kernels.clear()
        self._engine_info.clear()
        if not self._described:
            self.registry.register(self._engine_info)
            self._described = True
        for info in infos:
            self._engine_info.labels(info.checkpoint).info(
                {"backend": info.backend, "precision": info.precision, "device": info.device, "version": version}
            )
            for kernel, reason in info.replaced_kernels.items():
                self.replaced_kernels.labels(kernel, reason).set(1)

    def name_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Reserves series for sizes (width, height), independent of what clients request."""
        self._sizes |= {(width, height): (str(width), str(height)) for width, height in sizes}
        self._max_sizes = len(self._sizes) + MAX_REQUESTED_SIZES

    def observe_batch(self, jobs: int, model: str) -> None:
        """Counts a batch of a model (Job.model)."""
        self._batch_sizes[model].observe(jobs)

    def observe_stages(self, seconds: Mapping[str, float], model: str) -> None:
        """Records a job's seconds in stages of STAGES."""
        for stage, value in seconds.items():
            self._stages[model, stage].observe(value)

    def count_image(self, width: int, height: int, steps: int, model: str = "") -> None:
        """Counts a generated image; width and height in pixels."""
        size = (width, height)
        if size not in self._sizes and len(self._sizes) < self._max_sizes:
            self._sizes[size] = (str(width), str(height))
        self.images.labels(*self._sizes.get(size, OTHER_SIZE), steps, *self._model_labels[model]).inc()

    def watch_memory(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Publishes sana_sprint_gpu_memory_bytes, read at each scrape: kind (used, reserved, total) -> bytes."""
        if self._memory is not None:
            self.registry.unregister(self._memory)
        self._memory = _GpuMemory(read)
        self.registry.register(self._memory)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format, with those of every answered request."""
        self.bookkeeping.finish()
        return generate_latest(_WithoutCreated(self.registry))


class _WithoutCreated(CollectorRegistry):
    """A registry without the _created series, which double the size of each counter and histogram."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _GpuMemory(Collector):
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("sana_sprint_gpu_memory_bytes", "Memory of the GPU.", labels=("kind",))
        for kind, size in self._read().items():
            family.add_metric((kind,), size)
        yield family
