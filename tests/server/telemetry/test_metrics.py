"""Metrics: exactly the documented names, labels and buckets; no label that a client chooses."""

import re
import threading
from collections.abc import Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from running_server import GatedEngine, Running, Serve

from engines.fake import FakeEngine
from engines.types import Deliver, EngineInfo, Job, RawImage
from server.telemetry.metrics import MAX_REQUESTED_SIZES, Metrics

REQUEST = ".005 .01 .02 .03 .04 .05 .06 .075 .1 .125 .15 .2 .25 .3 .4 .5 .75 1 2 5 10"
STAGE = ".0005 .001 .002 .004 .008 .016 .032 .064 .128 .256 .512 1 2 5 10"

CONTRACT = {  # family -> type, labels (le aside)
    "sana_sprint_requests": ("counter", {"route", "status"}),
    "sana_sprint_request_duration_seconds": ("histogram", {"route"}),
    "sana_sprint_stage_duration_seconds": ("histogram", {"stage"}),
    "sana_sprint_batch_size": ("histogram", set()),
    "sana_sprint_batch_padding": ("counter", set()),
    "sana_sprint_images": ("counter", {"width", "height", "steps"}),
    "sana_sprint_jobs_waiting": ("gauge", set()),
    "sana_sprint_jobs_running": ("gauge", set()),
    "sana_sprint_jobs_dropped": ("counter", {"reason"}),
    "sana_sprint_prompt_cache_hits": ("counter", set()),
    "sana_sprint_prompt_cache_misses": ("counter", set()),
    "sana_sprint_engine_info": ("gauge", {"checkpoint", "backend", "precision", "device", "version"}),
}


def test_names_types_and_labels(plain: Running) -> None:
    plain.generate()
    answer = plain.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for name, (kind, labels) in CONTRACT.items():
        assert families[name].type == kind, name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels, sample
    beyond = {name for name in families if name.startswith("sana_sprint_")} - set(CONTRACT)
    ours = {"sana_sprint_engine_failures", "sana_sprint_cuda_graph_misses", "sana_sprint_origins_refused"}
    ours |= {"sana_sprint_replaced_kernels", "sana_sprint_workers_desired", "sana_sprint_worker_ready"}
    ours |= {"sana_sprint_safety_checks", "sana_sprint_safety_check_duration_seconds"}
    ours |= {"sana_sprint_engine_build_progress", "sana_sprint_engine_build_seconds_left"}
    assert {name for name in beyond if not name.startswith("sana_sprint_live_")} == ours
    assert not any(name.endswith("_created") for name in re.findall(r"^\w+", answer.text, re.MULTILINE))


def buckets(running: Running, name: str, **labels: str) -> list[float]:
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"{name}_bucket"]
    chosen = [sample.labels["le"] for sample in samples if labels.items() <= sample.labels.items()]
    return [float(bound) for bound in chosen if bound != "+Inf"]


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


def test_buckets_are_the_contracts(plain: Running) -> None:
    plain.generate()
    assert buckets(plain, "sana_sprint_request_duration_seconds", route="/generate") == numbers(REQUEST)
    for stage in ("queue", "text", "denoise", "decode", "encode"):
        assert buckets(plain, "sana_sprint_stage_duration_seconds", stage=stage) == numbers(STAGE)
    assert buckets(plain, "sana_sprint_batch_size") == [1, 2, 4, 8, 16, 32]


def test_buckets_can_be_set(serve: Serve) -> None:
    running = serve(request_buckets=(0.1, 0.2), stage_buckets=(3.0,))
    running.generate()
    assert buckets(running, "sana_sprint_request_duration_seconds", route="/generate") == [0.1, 0.2]
    assert buckets(running, "sana_sprint_stage_duration_seconds", stage="text") == [3.0]


def test_what_one_request_leaves(serve: Serve) -> None:
    running = serve(FakeEngine(delay_s=0.05))
    assert running.generate(num_images=3, num_inference_steps=2, width=96).status_code == 200
    assert running.metric("sana_sprint_requests_total", route="/generate", status="200") == 1
    assert running.metric("sana_sprint_request_duration_seconds_count", route="/generate") == 1
    assert running.metric("sana_sprint_request_duration_seconds_sum", route="/generate") >= 0.05
    assert running.metric("sana_sprint_images_total", width="96", height="64", steps="2") == 3
    for stage in ("queue", "text", "denoise", "decode", "encode"):
        assert running.metric("sana_sprint_stage_duration_seconds_count", stage=stage) == 3
    assert running.metric("sana_sprint_stage_duration_seconds_sum", stage="decode") >= 3 * 0.05 * 0.6
    hits = running.metric("sana_sprint_prompt_cache_hits_total")
    assert (hits, running.metric("sana_sprint_prompt_cache_misses_total")) == (2, 1)


def test_whatever_clients_ask_for_routes_stay_few(plain: Running) -> None:
    for path in ("/a", "/b/c", "/generate/x", "/v1/x", "/static/none", "/static/../x", "/docs", "/openapi.json", "/"):
        plain.client.get(path)
    text = plain.client.get("/metrics").text
    routes = set(re.findall(r'sana_sprint_requests_total\{route="([^"]*)"', text))
    assert routes <= {
        *("unmatched", "/static", "/docs", "/openapi.json", "/", "/metrics"),
        *("/generate", "/health/ready", "/health/live", "/v1/info"),
    }


def test_whatever_sizes_clients_ask_for_series_stay_few(serve: Serve) -> None:
    running = serve(FakeEngine())  # runs any multiple of 32, as PyTorch does
    sizes = [(32 * (2 + i % 8), 32 * (2 + i // 8)) for i in range(MAX_REQUESTED_SIZES + 3)]
    for width, height in [*sizes, sizes[0]]:
        assert running.generate(width=width, height=height).status_code == 200
    width, height = running.service.scheduler.engine.limits.default_size
    assert running.generate(width=width, height=height).status_code == 200
    text = running.client.get("/metrics").text
    assert len(re.findall(r"^sana_sprint_images_total{", text, re.MULTILINE)) == MAX_REQUESTED_SIZES + 2
    for labels, count in (
        ({"width": "64", "height": "64"}, 2),
        ({"width": "other", "height": "other"}, 3),
        ({"width": str(width), "height": str(height)}, 1),
    ):
        assert running.metric("sana_sprint_images_total", **labels, steps="1") == count


def test_no_prompt_seed_or_request_id_is_a_label(plain: Running) -> None:
    headers = {"x-request-id": "my-request-id"}
    plain.client.post("/generate", json={"prompt": "a secret prompt", "seed": 123454321}, headers=headers)
    text = plain.client.get("/metrics").text
    assert not any(word in text for word in ("secret", "123454321", "my-request-id"))


def test_gpu_memory_is_shown_where_the_engine_reports_it(serve: Serve) -> None:
    class WithMemory(GatedEngine):
        def memory_bytes(self) -> dict[str, int]:
            return {"used": 5, "reserved": 7, "total": 9}

    running = serve(WithMemory())
    for kind, size in {"used": 5, "reserved": 7, "total": 9}.items():
        assert running.metric("sana_sprint_gpu_memory_bytes", kind=kind) == size


def test_each_app_has_its_own_registry() -> None:
    first, second = (Metrics(request_buckets=(1.0,), stage_buckets=(1.0,)) for _ in range(2))
    first.padding.inc(3)
    assert isinstance(first.registry, CollectorRegistry)
    assert b"sana_sprint_batch_padding_total 3.0" in first.exposition()
    assert b"sana_sprint_batch_padding_total 0.0" in second.exposition()


def test_replaced_kernels_are_named(serve: Serve) -> None:
    class Odd(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, replaced_kernels={"convolution": "differs: 12 dB"})

    running = serve(Odd())
    assert running.metric("sana_sprint_replaced_kernels", kernel="convolution", reason="differs: 12 dB") == 1
    assert running.client.get("/v1/info").json()["replaced_kernels"] == {"convolution": "differs: 12 dB"}


class SmallGraphs(FakeEngine):
    """Behaves as an engine with CUDA graphs for 64x64 alone. After an image, it goes on until `checked` is released."""

    checked = threading.Semaphore(0)

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        images = [replace(image, uncaptured=jobs[0].width != 64) for image in super().generate(jobs)]
        for index, image in enumerate(images):
            if deliver is not None:
                deliver(index, image)
        assert self.checked.acquire(timeout=30)
        return images


def test_batches_without_a_graph_are_counted_before_the_answer(serve: Serve) -> None:
    running = serve(SmallGraphs())
    for width, count in ((64, 0), (96, 1), (96, 2), (64, 2)):
        assert running.generate(width=width).status_code == 200
        assert running.metric("sana_sprint_cuda_graph_misses_total") == count
        SmallGraphs.checked.release()
