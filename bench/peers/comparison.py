"""Peers, started one at a time in their environments, under the same loads."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.harness.load_generator import Order, Record, Traffic
from bench.harness.summary import spread, table
from distill.evaluation.scores import evaluation_prompts

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venvs"
PEERS = ("ours", "fastapi", "litserve", "ray", "bentoml")
CAPTIONS = 400
WARMUP = 64
READY_S, END_S, PATIENCE_S = 180.0, 30.0, 30.0


@dataclass(frozen=True, slots=True)
class Listed(Order):
    """As BentoML takes it: a list of one."""

    def body(self) -> bytes:
        return b'{"orders": [' + Order.body(self) + b"]}"


def python_of(peer: str) -> Path:
    """The interpreter of its environment."""
    if peer in ("ours", "fastapi"):
        return Path(sys.executable)
    return ENVIRONMENTS / f"peer-{peer}" / "bin" / "python"


def command_of(peer: str, engine: str, port: int) -> list[str]:
    """What starts `peer` on `port` of 127.0.0.1."""
    if peer == "ours":
        fake = engine.startswith("fake:")
        flags = ["--backend", "fake", "--fake-delay-ms", engine[5:]] if fake else ["--model", engine]
        words = ["server", *flags, "--max-batch", "8", "--max-queue", "512", "--port", str(port)]
    elif peer == "bentoml":
        words = ["bentoml", "serve", "bench.peers.bentoml_app:Generate", "--host", "127.0.0.1", "--port", str(port)]
    else:
        words = [f"bench.peers.{peer}_app", str(port)]
    return [str(python_of(peer)), "-m", *words]


@contextlib.contextmanager
def running(peer: str, engine: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """URL and process of a started peer, which may not answer yet; with the block ends all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "BENCH_PEER_ENGINE": engine, "BENTOML_DO_NOT_TRACK": "True"}
        words = command_of(peer, engine, port)
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}", process
        except BenchError as error:
            last = os.pread(log.fileno(), 2000, max(0, os.fstat(log.fileno()).st_size - 2000)).decode(errors="replace")
            raise BenchError(f"{peer}: {error}\n{last}") from error
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.wait()


def orders(peer: str, count: int, first_seed: int) -> list[Order]:
    kind = Listed if peer == "bentoml" else Order
    prompts = [prompt.text for prompt in evaluation_prompts(CAPTIONS)]
    return [kind(prompts[i % CAPTIONS], first_seed + i, 1, "png") for i in range(count)]


async def measure(
    peer: str, url: str, process: subprocess.Popen[bytes], loads: argparse.Namespace
) -> list[dict[str, object]]:
    """One row for each load. Raises BenchError where the peer does not answer."""
    rows = []
    with tempfile.TemporaryFile() as spool:
        traffic = Traffic(url, spool, patience_s=PATIENCE_S)
        await _ready(traffic, peer, process)
        await traffic.closed_loop(orders(peer, WARMUP, 10**6), 8)
        for clients in loads.concurrency:
            pace = await _paced(traffic, peer, clients)
            asked = orders(peer, max(3 * clients, round(pace * loads.seconds)), 0)
            began = time.perf_counter()
            records = await traffic.closed_loop(asked, clients)
            rows.append(_row(f"{clients} clients", records, time.perf_counter() - began))
        for rate in loads.rates:
            asked = orders(peer, round(rate * loads.seconds), 0)
            began = time.perf_counter()
            records = await traffic.open_loop(asked, rate)
            rows.append(_row(f"{rate:g}/s", records, time.perf_counter() - began))
        await traffic.close()
    return rows


async def _ready(traffic: Traffic, peer: str, process: subprocess.Popen[bytes]) -> None:
    end = time.perf_counter() + READY_S
    while time.perf_counter() < end and process.poll() is None:
        [record] = await traffic.closed_loop(orders(peer, 1, 10**6), 1)
        if record.status == 200:
            return
        await asyncio.sleep(0.2)
    raise BenchError(
        f"not ready within {READY_S:g} s, or gone (code {process.returncode}): got {record.status} {record.error}"
    )


async def _paced(traffic: Traffic, peer: str, clients: int) -> float:
    """Answers a second, roughly, so that every peer is measured for as long."""
    asked = orders(peer, 2 * clients + 8, 2 * 10**6)
    began = time.perf_counter()
    await traffic.closed_loop(asked, clients)
    return len(asked) / (time.perf_counter() - began)


def _row(load: str, records: Sequence[Record], seconds: float) -> dict[str, object]:
    good = [record for record in records if record.status == 200]
    return {
        "load": load,
        "requests": len(records),
        "lost": len(records) - len(good),
        "throughput": round(len(good) / seconds, 2),
        "latency_ms": spread([1000 * record.seconds for record in good]),
    }


def versions(peer: str) -> str:
    """The release of what the peer is made of."""
    package = {"ours": "sana-sprint-server"}.get(peer, peer)
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python_of(peer), "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON document; peers that are not installed stand in `absent`."""
    present = [peer for peer in options.peers if python_of(peer).exists()]
    rows = []
    for engine in options.engine:
        for peer in present:
            with running(peer, engine) as (url, process):
                for row in asyncio.run(measure(peer, url, process, options)):
                    rows.append({"engine": engine, "peer": peer, **row})
                    print(_line(rows[-1]), file=sys.stderr, flush=True)
    return {
        "program": "bench.peers",
        "command": options.command,
        "machine": machine(),
        "seconds": options.seconds,
        "absent": [peer for peer in options.peers if peer not in present],
        "versions": {peer: versions(peer) for peer in present},
        "rows": rows,
    }


def _line(row: dict[str, Any]) -> str:
    times = row["latency_ms"] or {}
    figures = " ".join(f"{key} {times.get(key, float('nan')):.1f}" for key in ("p50", "p95", "p99"))
    return f"{row['engine']} {row['peer']} {row['load']}: {row['throughput']}/s, {figures} ms, {row['lost']} lost"


def show(found: dict[str, Any]) -> str:
    """One table: a load in each block, a peer in each line."""
    head = ("engine", "load", "peer", "answers/s", "p50, ms", "p95, ms", "p99, ms", "lost")
    loads = list(dict.fromkeys((row["engine"], row["load"]) for row in found["rows"]))
    lines = []
    for engine, load in loads:
        for row in found["rows"]:
            if (row["engine"], row["load"]) == (engine, load):
                times = row["latency_ms"] or {}
                figures = (times.get(key) for key in ("p50", "p95", "p99"))
                lines.append([engine, load, row["peer"], row["throughput"], *figures, row["lost"]])
    absent = f"\n\nnot installed (make peers): {', '.join(found['absent'])}" if found["absent"] else ""
    return table(head, lines) + absent
