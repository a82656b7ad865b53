"""Prometheus metrics, one registry per app.

Labels never hold a prompt, a seed or a request id. The number of series is bounded: if an engine runs any size, only
MAX_REQUESTED_SIZES of the requested ones get their own series.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.types import EngineInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)
STAGES = ("queue", "text", "denoise", "decode", "encode")
MAX_REQUESTED_SIZES = 32  # sizes with their own series, besides the engine's; all further ones share OTHER_SIZE
OTHER_SIZE = ("other", "other")


class Metrics:
    """All metrics of one app; `exposition` returns them as text."""

    def __init__(self, *, request_buckets: Iterable[float], stage_buckets: Iterable[float]) -> None:
        request_bounds, stage_bounds = tuple(request_buckets), tuple(stage_buckets)
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "sana_sprint_requests", "Answered requests.", ("route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "sana_sprint_request_duration_seconds",
            "From the first byte of a request's head to the last byte of its answer.",
            ("route",),
            buckets=request_bounds,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "sana_sprint_stage_duration_seconds",
            "Duration of a stage per job; text, denoise and decode are those of its batch.",
            ("stage",),
            buckets=stage_bounds,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "sana_sprint_batch_size", "Jobs in a batch.", buckets=BATCH_BUCKETS, registry=self.registry
        )
        self.padding = Counter("sana_sprint_batch_padding", "Padded slots run for nothing.", registry=self.registry)
        self.cuda_graph_misses = Counter(
            "sana_sprint_cuda_graph_misses",
            "Batches without a captured CUDA graph, of an engine that has some.",
            registry=self.registry,
        )
        self.images = Counter(
            "sana_sprint_images", "Generated images.", ("width", "height", "steps"), registry=self.registry
        )
        self._sizes: dict[tuple[int, int], tuple[str, str]] = {}  # (width, height) -> labels
        self._max_sizes = MAX_REQUESTED_SIZES
        self.waiting = Gauge("sana_sprint_jobs_waiting", "Accepted jobs that wait for a batch.", registry=self.registry)
        self.running = Gauge("sana_sprint_jobs_running", "Jobs in the running batch.", registry=self.registry)
        self.dropped = Counter("sana_sprint_jobs_dropped", "Jobs that never ran.", ("reason",), registry=self.registry)
        self.cache_hits = Counter(
            "sana_sprint_prompt_cache_hits", "Jobs whose prompt was encoded before.", registry=self.registry
        )
        self.cache_misses = Counter(
            "sana_sprint_prompt_cache_misses", "Jobs whose prompt had to be encoded.", registry=self.registry
        )
        self.engine_failures = Counter(
            "sana_sprint_engine_failures",
            "Failed calls of the engine; a failed batch and each of its retried jobs count.",
            ("kind",),
            registry=self.registry,
        )
        self.origins_refused = Counter(
            "sana_sprint_origins_refused",
            "Requests of pages of other sites, refused by their Origin.",
            ("kind",),
            registry=self.registry,
        )
        self.replaced_kernels = Gauge(
            "sana_sprint_replaced_kernels",
            "1 for each kernel that its reference replaces on this GPU, with the reason.",
            ("kernel", "reason"),
            registry=self.registry,
        )
        self.workers_desired = Gauge(
            "sana_sprint_workers_desired", "Configured number of processes (--workers).", registry=self.registry
        )
        self.worker_ready = Gauge(
            "sana_sprint_worker_ready",
            "1 if this process is ready; an ended process has no series.",
            registry=self.registry,
        )
        self.build_progress = Gauge(
            "sana_sprint_engine_build_progress",
            "Progress of the engine build from 0 to 1; 1 without a build.",
            registry=self.registry,
        )
        self.build_seconds_left = Gauge(
            "sana_sprint_engine_build_seconds_left",
            "Estimated seconds until the engine build ends; 0 without a build.",
            registry=self.registry,
        )
        self._engine_info = Info("sana_sprint_engine", "What runs.", registry=None)
        self._described = False
        self._memory: _GpuMemory | None = None
        self.live_sessions = Gauge("sana_sprint_live_sessions", "Open live sessions.", registry=self.registry)
        self.live_ended = Counter(
            "sana_sprint_live_sessions_ended", "Live sessions that ended.", ("reason",), registry=self.registry
        )
        self.live_seconds = Histogram(
            "sana_sprint_live_image_duration_seconds",
            "From receiving the newest drawing or setting of an image to sending the image.",
            buckets=request_bounds,
            registry=self.registry,
        )
        self.live_superseded = Counter(
            "sana_sprint_live_drawings_superseded",
            "Drawings that a newer one replaced before they were run.",
            registry=self.registry,
        )
        self.safety_checks = Counter(
            "sana_sprint_safety_checks",
            "Checks of prompts and images; failed counts errors of a checker.",
            ("what", "verdict"),
            registry=self.registry,
        )
        self.safety_seconds = Histogram(
            "sana_sprint_safety_check_duration_seconds",
            "Time of one check.",
            ("what",),
            buckets=stage_bounds,
            registry=self.registry,
        )
        for reason in ("client", "idle", "slow", "draining", "too_many_sessions"):
            self.live_ended.labels(reason)
        for kind in ("request", "websocket"):
            self.origins_refused.labels(kind)
        for reason in ("client_gone", "deadline", "draining", "queue_full"):
            self.dropped.labels(reason)
        for kind in ("error", "out_of_memory", "output", "hang"):
            self.engine_failures.labels(kind)
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    def describe_engine(self, info: EngineInfo, version: str) -> None:
        """Publishes sana_sprint_engine_info and the replaced kernels; overwrites those of an earlier engine.

        `version` is this package's.
        """
        self.replaced_kernels.clear()
        if not self._described:
            self.registry.register(self._engine_info)
            self._described = True
        self._engine_info.info(
            {
                "checkpoint": info.checkpoint,
                "backend": info.backend,
                "precision": info.precision,
                "device": info.device,
                "version": version,
            }
        )
        for kernel, reason in info.replaced_kernels.items():
            self.replaced_kernels.labels(kernel, reason).set(1)

    def name_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Reserves series for sizes (width, height), independent of what clients request."""
        self._sizes |= {(width, height): (str(width), str(height)) for width, height in sizes}
        self._max_sizes = len(self._sizes) + MAX_REQUESTED_SIZES

    def count_image(self, width: int, height: int, steps: int) -> None:
        """Counts a generated image; width and height in pixels."""
        size = (width, height)
        if size not in self._sizes and len(self._sizes) < self._max_sizes:
            self._sizes[size] = (str(width), str(height))
        self.images.labels(*self._sizes.get(size, OTHER_SIZE), steps).inc()

    def watch_memory(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Publishes sana_sprint_gpu_memory_bytes, read at each scrape: kind (used, reserved, total) -> bytes."""
        if self._memory is not None:
            self.registry.unregister(self._memory)
        self._memory = _GpuMemory(read)
        self.registry.register(self._memory)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
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
