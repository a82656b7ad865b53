"""Runs one load against one server and reads the server's state before and after."""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import psutil

from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.prometheus_text import parse_samples
from bench.harness.server_process import RunningServer, running_server
from bench.harness.summary import percentiles, table
from bench.load.image_checks import CheckResult, run_check
from distill.evaluation.scores import evaluation_prompts

WARMUP_SEED = 2**40  # apart from the seeds of the run, which count from --seed
SETTLE_S = 5.0  # for the server to notice that our connections are closed


@dataclass(frozen=True, slots=True)
class ServerState:
    """Metrics and threads of a server at one moment."""

    samples: dict[str, float]
    threads: int | None  # of a server of our own

    @property
    def files(self) -> int:
        return int(self.samples["process_open_fds"])

    @property
    def memory_bytes(self) -> float:
        return self.samples["process_resident_memory_bytes"]


@dataclass(frozen=True, slots=True)
class Run:
    """Records of a load, and the server's state around it."""

    records: list[RequestRecord]
    seconds: float
    before: ServerState
    after: ServerState
    info: dict[str, Any]  # GET /v1/info

    @property
    def size(self) -> tuple[int, int]:
        """Returns width and height of images whose request names none."""
        width, height = self.info["default_size"]
        return width, height


def make_requests(options: argparse.Namespace, count: int, first_seed: int) -> list[ImageRequest]:
    """Returns requests with captions of the tiny world in turn, each with a different seed."""
    prompts = [prompt.text for prompt in evaluation_prompts(options.prompts, seed=options.seed)]
    width, height = options.size or (None, None)
    return [
        ImageRequest(
            prompts[i % len(prompts)], first_seed + i, options.steps, options.format, width, height, options.timeout_ms
        )
        for i in range(count)
    ]


async def run(options: argparse.Namespace, url: str, server: RunningServer | None, spool: BinaryIO) -> Run:
    """Warms up, reads the state, sends the load, and reads the state again."""
    generator = LoadGenerator(url, spool, timeout_s=options.patience_s)
    count = options.requests or round(options.rate * options.seconds)
    warmup = await generator.closed_loop(make_requests(options, options.warmup, WARMUP_SEED), options.concurrency or 8)
    failed = [record for record in warmup if record.status != 200]
    if failed:
        raise BenchError(f"warm-up: got {failed[0].status} {failed[0].error}, needed is 200: {failed[0].request}")
    info = json.loads((await generator.get("/v1/info")).body)
    before = await _settled_state(generator, server, 0)
    began = time.perf_counter()
    if options.rate:
        records = await generator.open_loop(make_requests(options, count, options.seed), options.rate, options.seed)
    else:
        records = await generator.closed_loop(make_requests(options, count, options.seed), options.concurrency)
    seconds = time.perf_counter() - began
    after = await _settled_state(generator, server, before.files)
    spool.flush()
    await generator.close()
    return Run(records, seconds, before, after, info)


async def _settled_state(generator: LoadGenerator, server: RunningServer | None, files: int) -> ServerState:
    """The state once our connections are gone: when no more than `files` are open, or after SETTLE_S."""
    await generator.close()
    end = time.perf_counter() + SETTLE_S
    while True:
        parsed = parse_samples((await generator.get("/metrics")).body.decode())
        server_state = ServerState(parsed, psutil.Process(server.process.pid).num_threads() if server else None)
        if server_state.files <= files or time.perf_counter() > end or not files:
            return server_state
        await asyncio.sleep(0.05)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the load on our own server, or the one of --url; returns `summary`. Raises BenchError."""
    with tempfile.TemporaryFile() as spool:
        with contextlib.nullcontext() if options.url else running_server(options.flags) as server:
            load_run = asyncio.run(run(options, server.url if server else options.url, server, spool))
        check_result = run_check(
            options.check, load_run.records, spool.fileno(), load_run.size, options.flags, options.check_sample
        )
    return summary(options, load_run, check_result)


def is_wrong(result: Mapping[str, Any]) -> bool:
    """Returns whether a response was lost or an image is another request's; `judge` does not count here."""
    check = result["check"]
    return bool(result["lost"]) or (check["kind"] in ("fake", "rerun") and check["wrong"] > 0)


def summary(options: argparse.Namespace, load_run: Run, check_result: CheckResult) -> dict[str, Any]:
    """Returns the JSON document. Milliseconds, requests a second, bytes."""
    records, before, after = load_run.records, load_run.before, load_run.after
    good = [record for record in records if record.status == 200]
    statuses = Counter(record.status for record in records)
    in_time = sum(record.seconds * 1000 <= options.deadline_ms for record in good)
    lost = [record for record in records if record.status == 0]
    counted = {name: value - before.samples.get(name, 0.0) for name, value in after.samples.items()}
    batches = counted["sana_sprint_batch_size_count"]
    hits, misses = (counted[f"sana_sprint_prompt_cache_{name}_total"] for name in ("hits", "misses"))
    return {
        "program": "bench.load",
        "command": options.command,
        "loop": "open" if options.rate else "closed",
        "concurrency": options.concurrency,
        "rate": options.rate,
        "deadline_ms": options.deadline_ms,
        "size": options.size or load_run.size,
        "steps": options.steps,
        "format": options.format,
        "server": list(options.flags),
        "engine": {name: load_run.info[name] for name in ("checkpoint", "backend", "precision", "device", "max_batch")},
        "machine": host_facts(),
        "requests": len(records),
        "seconds": round(load_run.seconds, 3),
        "throughput": round(len(good) / load_run.seconds, 3),
        "goodput": round(in_time / load_run.seconds, 3),
        "in_time_share": round(in_time / len(records), 5),
        "statuses": {str(status): count for status, count in sorted(statuses.items()) if status},
        "lost": len(lost),
        "lost_reasons": dict(Counter(record.error for record in lost).most_common(5)),
        "check": {"kind": options.check, **asdict(check_result)},
        "latency_ms": percentiles([1000 * record.seconds for record in good]),
        "refusal_ms": percentiles([1000 * record.seconds for record in records if record.status not in (0, 200)]),
        "overhead_ms": percentiles([1000 * record.seconds - record.engine_ms for record in good]),
        "stages_ms": {
            name: percentiles([record.stages_ms[name] for record in good if name in record.stages_ms])
            for name in ("queue", "text", "denoise", "decode", "encode", "total")
        },
        "generator_late_ms": percentiles([1000 * record.send_delay_s for record in records]),
        "batch": {
            "count": int(batches),
            "mean_size": round(counted["sana_sprint_batch_size_sum"] / batches, 3) if batches else None,
            "padded_slots": int(counted["sana_sprint_batch_padding_total"]),
        },
        "prompt_cache_hit_share": round(hits / (hits + misses), 4) if hits + misses else None,
        "memory_bytes": {
            "before": int(before.memory_bytes),
            "after": int(after.memory_bytes),
            "growth": round(after.memory_bytes / before.memory_bytes - 1, 5),
        },
        "open_files": {"before": before.files, "after": after.files},
        "threads": {"before": before.threads, "after": after.threads},
        "server_cpu_seconds": round(counted["process_cpu_seconds_total"], 3),
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns the tables for people."""
    names = ("latency_ms", "overhead_ms", "refusal_ms", "generator_late_ms")
    times = {name.replace("_", " ").replace(" ms", ", ms"): result[name] for name in names}
    stages = result["stages_ms"]
    times |= {f"stage {name}, ms": value for name, value in stages.items()}
    columns = ("p50", "p95", "p99", "mean", "max", "count")
    rows = [[name, *(value[key] for key in columns)] for name, value in times.items() if isinstance(value, dict)]
    fact_names = [
        *("loop", "requests", "seconds", "throughput", "goodput", "in_time_share", "statuses", "lost", "lost_reasons"),
        *("batch", "prompt_cache_hit_share", "memory_bytes", "open_files", "threads"),
    ]
    facts = [[name, result[name]] for name in fact_names]
    check = result["check"]
    verdict = f"check {check['kind']}: {check['checked']} looked at, {check['wrong']} wrong"
    return "\n".join(
        [table(("time", *columns), rows), "", table(("fact", "value"), facts), "", verdict, *check["reasons"]]
    )
