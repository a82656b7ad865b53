"""Starts the peers one at a time in their environments and sends them the same loads."""

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.cpu_time import CpuUse
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.server_process import ROOT, free_port, log_tail
from bench.harness.summary import percentiles, table
from distill.evaluation.scores import evaluation_prompts

ENVIRONMENTS = ROOT / ".venvs"
PEERS = ("ours", "fastapi", "litserve", "ray", "bentoml")
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE"}  # our server's default: every peer computes alike
CAPTIONS = 400
WARMUP = 64
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 180.0, 30.0, 30.0


@dataclass(frozen=True, slots=True)
class ListRequest(ImageRequest):
    """A request in BentoML's form: a list of one."""

    def body(self) -> bytes:
        return b'{"requests": [' + ImageRequest.body(self) + b"]}"


def interpreter_of(peer: str) -> Path:
    """Returns the interpreter of the peer's environment."""
    if peer in ("ours", "fastapi"):
        return Path(sys.executable)
    return ENVIRONMENTS / f"peer-{peer}" / "bin" / "python"


def command_of(peer: str, engine: str, port: int) -> list[str]:
    """Returns the command that starts `peer` on `port` of 127.0.0.1."""
    if peer == "ours":
        fake = engine.startswith("fake:")
        flags = ["--backend", "fake", "--fake-delay-ms", engine[5:]] if fake else ["--model", engine]
        arguments = ["server", *flags, "--max-batch", "8", "--max-queue", "512", "--port", str(port)]
    elif peer == "bentoml":
        arguments = ["bentoml", "serve", "bench.peers.bentoml_app:Generate", "--host", "127.0.0.1", "--port", str(port)]
    else:
        arguments = [f"bench.peers.{peer}_app", str(port)]
    return [str(interpreter_of(peer)), "-m", *arguments]


@contextlib.contextmanager
def running_peer(peer: str, engine: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts a peer and yields its URL and process, possibly before it answers; ends its process group."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, **OPENMP, "BENCH_PEER_ENGINE": engine, "BENTOML_DO_NOT_TRACK": "True"}
        arguments = command_of(peer, engine, port)
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}", process
        except BenchError as error:
            raise BenchError(f"{peer}: {error}\n{log_tail(log.fileno())}") from error
        finally:
            _terminate(process)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    for signal_number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    process.wait()


def make_requests(peer: str, count: int, first_seed: int) -> list[ImageRequest]:
    request_type = ListRequest if peer == "bentoml" else ImageRequest
    prompts = [prompt.text for prompt in evaluation_prompts(CAPTIONS)]
    return [request_type(prompts[i % CAPTIONS], first_seed + i, 1, "png") for i in range(count)]


async def measure(
    peer: str, url: str, process: subprocess.Popen[bytes], loads: argparse.Namespace
) -> list[dict[str, object]]:
    """Returns one row for each load. Raises BenchError if the peer does not answer."""
    rows = []
    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool, timeout_s=REQUEST_TIMEOUT_S)
        await _ready(generator, peer, process)
        await generator.closed_loop(make_requests(peer, WARMUP, 10**6), 8)
        for clients in loads.concurrency:
            pace = await _throughput(generator, peer, clients)
            requests = make_requests(peer, max(3 * clients, round(pace * loads.seconds)), 0)
            rows.append(await _row(f"{clients} clients", generator.closed_loop(requests, clients), process.pid))
        for rate in loads.rates:
            requests = make_requests(peer, round(rate * loads.seconds), 0)
            rows.append(await _row(f"{rate:g}/s", generator.open_loop(requests, rate), process.pid))
        await generator.close()
    return rows


async def _ready(generator: LoadGenerator, peer: str, process: subprocess.Popen[bytes]) -> None:
    end = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < end and process.poll() is None:
        [record] = await generator.closed_loop(make_requests(peer, 1, 10**6), 1)
        if record.status == 200:
            return
        await asyncio.sleep(0.2)
    raise BenchError(
        f"not ready within {START_TIMEOUT_S:g} s, or gone (code {process.returncode}): "
        f"got {record.status} {record.error}"
    )


async def _throughput(generator: LoadGenerator, peer: str, clients: int) -> float:
    """Returns a rough number of responses a second, so that every peer is measured for the same time."""
    requests = make_requests(peer, 2 * clients + 8, 2 * 10**6)
    began = time.perf_counter()
    await generator.closed_loop(requests, clients)
    return len(requests) / (time.perf_counter() - began)


async def _row(load: str, work: Awaitable[Sequence[RequestRecord]], session: int) -> dict[str, object]:
    used, began = CpuUse.of_session(session), time.perf_counter()
    records = await work
    seconds = time.perf_counter() - began
    used = CpuUse.of_session(session).since(used)
    good = [record for record in records if record.status == 200]
    seen = used.switches > len(records)  # False for processes that left the session, as BentoML's do
    return {
        "load": load,
        "requests": len(records),
        "lost": len(records) - len(good),
        "throughput": round(len(good) / seconds, 2),
        "latency_ms": percentiles([1000 * record.seconds for record in good]),
        "cpu_ms": round(1000 * used.seconds / len(records), 3) if seen else None,
        "switches": round(used.switches / len(records), 2) if seen else None,
    }


def versions(peer: str) -> str:
    """Returns the installed release of the peer's package."""
    package = {"ours": "sana-sprint-server"}.get(peer, peer)
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([interpreter_of(peer), "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document; `absent` names the peers that are not installed."""
    present = [peer for peer in options.peers if interpreter_of(peer).exists()]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}  # rows by engine, peer, load
    for engine in options.engine:
        for _, peer in itertools.product(range(options.repetitions), present):
            with running_peer(peer, engine) as (url, process):
                for measured in asyncio.run(measure(peer, url, process, options)):
                    row = {"engine": engine, "peer": peer, **measured}
                    found.setdefault((engine, peer, row["load"]), []).append(row)
                    print(_line(row), file=sys.stderr, flush=True)
    return {
        "program": "bench.peers",
        "command": options.command,
        "machine": host_facts(),
        "seconds": options.seconds,
        "repetitions": options.repetitions,
        "absent": [peer for peer in options.peers if peer not in present],
        "versions": {peer: versions(peer) for peer in present},
        "rows": [medians(rows) for rows in found.values()],
    }


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row for the repetitions of a load: medians, requests and losses in sum.

    `spread` has the least and the most of throughput and latencies.
    """
    answered = [row["latency_ms"] for row in rows if row["latency_ms"]]
    latencies = {key: [times[key] for times in answered] for key in (answered[0] if answered else ())}
    figures = {name: [row[name] for row in rows] for name in ("throughput", "cpu_ms", "switches")}
    spread = {"throughput": figures["throughput"], **{key: latencies[key] for key in ("p50", "p99") if latencies}}
    return {
        **rows[0],
        **{name: sum(row[name] for row in rows) for name in ("requests", "lost")},
        **{name: None if None in values else median(values) for name, values in figures.items()},
        "latency_ms": {key: median(values) for key, values in latencies.items()} or None,
        "spread": {name: [min(values), max(values)] for name, values in spread.items()},
    }


def _line(row: dict[str, Any]) -> str:
    times = row["latency_ms"] or {}
    figures = " ".join(f"{key} {times.get(key, float('nan')):.1f}" for key in ("p50", "p95", "p99"))
    cost = "" if row["cpu_ms"] is None else f", {row['cpu_ms']} ms of CPU, {row['switches']} switches"
    lost = f"{row['lost']} lost{cost}"
    return f"{row['engine']} {row['peer']} {row['load']}: {row['throughput']}/s, {figures} ms, {lost}"


def _range(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def show(result: dict[str, Any]) -> str:
    """Returns a table with a block for each load and a line for each peer. CPU and switches are a request's."""
    head: tuple[str, ...] = ("engine", "load", "peer", "answers/s", "p50, ms", "p95, ms", "p99, ms", "lost")
    costs = {"cpu_ms": "CPU, ms", "switches": "switches"}
    told = [cost for cost in costs if any(cost in row for row in result["rows"])]  # older results have none
    spreads = [name for name in ("throughput", "p99") if any(name in row.get("spread", ()) for row in result["rows"])]
    named = {"throughput": "answers/s", "p99": "p99, ms"}
    head = (*head, *(costs[cost] for cost in told), *(f"{named[name]}: least to most" for name in spreads))
    loads = list(dict.fromkeys((row["engine"], row["load"]) for row in result["rows"]))
    lines = []
    for engine, load in loads:
        for row in result["rows"]:
            if (row["engine"], row["load"]) == (engine, load):
                times = row["latency_ms"] or {}
                figures = (times.get(key) for key in ("p50", "p95", "p99"))
                cost = (row.get(name) for name in told)
                ranges = (_range(row.get("spread", {}).get(name)) for name in spreads)
                lines.append([engine, load, row["peer"], row["throughput"], *figures, row["lost"], *cost, *ranges])
    absent = f"\n\nnot installed (make peers): {', '.join(result['absent'])}" if result["absent"] else ""
    return table(head, lines) + absent
