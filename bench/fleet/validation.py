"""Compares the simulation with real servers: the same arrivals, sent and simulated, on the fake engine.

    python -m bench.fleet.validation --seconds 60

Runs six loads on one and on two workers, from a fifth of the capacity to more than all of it. First it measures the
fake engine's batches of one and of eight and HTTP's share of a single request; nothing is fitted. Near capacity, how
long two workers keep a request in one run is chance: `--runs 5` compares medians of five. Prints a table, then one JSON
document as the last line. Exit code 1: p50 or p99 of the two differ by more than 15 %. The load average is reported,
because a busy machine delays the real server.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.fleet.replica import Limits
from bench.fleet.run import SimulationConfig, simulate
from bench.fleet.simulation import Fleet
from bench.fleet.stages import BatchSeconds, Stages
from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.server_process import running_server
from bench.harness.summary import table
from engines.types import Job, powers_of_two

LOADS = (0.2, 0.4, 0.6, 0.8, 0.95, 1.2)  # of the capacity
WORKERS = (1, 2)
BATCH, QUEUE, SIDE = 8, 32, 64
ALONE = 40  # requests one after the other, to measure HTTP's share
ALLOWED = 0.15


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Returns the arrival times of LoadGenerator.open_loop."""
    rng = random.Random(seed)
    at, result = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        result.append(at)
    return result


def make_requests(count: int) -> list[ImageRequest]:
    return [ImageRequest("a red circle", i, 1, "jpeg", SIDE, SIDE) for i in range(count)]


async def stages_of(url: str) -> Stages:
    """Measures the fake engine's batches of one and of BATCH, and HTTP's share of a single request."""
    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool)
        await generator.closed_loop(make_requests(ALONE), 1)
        alone = await generator.closed_loop(make_requests(ALONE), 1)
        saturated = await generator.closed_loop(make_requests(ALONE * BATCH), 2 * BATCH)
        await generator.close()
    single, full = (float(np.median([record.engine_ms / 1000 for record in records])) for records in (alone, saturated))
    http_s = float(np.median([record.seconds for record in alone])) - single
    batches = {
        jobs: BatchSeconds(single + (full - single) * (jobs - 1) / (BATCH - 1), 0.0) for jobs in powers_of_two(BATCH)
    }
    return Stages("measured on the fake engine", {(SIDE, SIDE, 1): batches}, http_s=http_s)


async def send_load(url: str, rate: float, count: int, seed: int) -> list[RequestRecord]:
    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool)
        try:
            return await generator.open_loop(make_requests(count), rate, seed)
        finally:
            await generator.close()


def row(
    workers: int, share: float, rate: float, runs: Sequence[tuple[Sequence[RequestRecord], dict[str, Any]]]
) -> dict[str, Any]:
    """Returns the row of a load: medians over its runs, in milliseconds. `off` is simulated over real, less one.

    runs: what was sent, and the figures of its simulation.
    """
    real = [_figures(records) for records, _ in runs]
    simulated = [
        {"p50": figures["p50_ms"], "p99": figures["p99_ms"], "refused": figures["refused"]} for _, figures in runs
    ]
    middle = {"real": _medians(real), "simulated": _medians(simulated)}
    late_s = [record.send_delay_s for records, _ in runs for record in records]
    return {
        "workers": workers,
        "of_capacity": share,
        "rate": round(rate, 1),
        **middle,
        "off": {name: round(middle["simulated"][name] / middle["real"][name] - 1, 4) for name in ("p50", "p99")},
        "runs": {"real": real, "simulated": simulated},
        "generator_late_ms": round(1000 * float(np.percentile(late_s, 99)), 2),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    good = [1000 * record.seconds for record in records if record.status == 200]
    p50, p99 = (round(float(value), 2) for value in np.percentile(good, [50, 99]))
    return {"p50": p50, "p99": p99, "refused": sum(record.status == 429 for record in records)}


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.median([run[name] for run in runs])), 2) for name in runs[0]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError if a server does not start."""
    delay = options.batch_ms
    rows: list[dict[str, Any]] = []
    flags = ["--backend", "fake", "--fake-delay-ms", str(delay), "--max-batch", str(BATCH), "--max-queue", str(QUEUE)]
    measured: dict[int, dict[str, float]] = {}
    for workers in WORKERS:
        with running_server([*flags, "--log-level", "warning", "--workers", str(workers)]) as server:
            stages = asyncio.run(stages_of(server.url))
            measured[workers] = {"http_ms": round(1000 * stages.http_s, 3)}
            for bucket, seconds in stages.batches[SIDE, SIDE, 1].items():
                measured[workers][f"batch_{bucket}_ms"] = round(1000 * seconds.before, 3)
            for share in LOADS:
                rate = share * workers * 1000 * BATCH / delay
                count = int(rate * options.seconds)
                runs = []
                for seed in range(options.seed, options.seed + options.runs):
                    records = asyncio.run(send_load(server.url, rate, count, seed))
                    sent = tuple((at, Job("", 0, SIDE, SIDE)) for at in arrivals(rate, count, seed))
                    fleet = Fleet(workers, sent[-1][0], Limits(BATCH, QUEUE), routing="connections")
                    runs.append((records, simulate(SimulationConfig(fleet, rate, recorded=sent), stages)))
                rows.append(row(workers, share, rate, runs))
                print(f"{workers} workers, {share:g} of the capacity: {rows[-1]['off']}", file=sys.stderr, flush=True)
    worst = max(abs(load["off"][name]) for load in rows for name in ("p50", "p99"))
    document = {"program": "bench.fleet.validation", "command": options.command, "machine": host_facts()}
    return document | {"batch_ms": delay, "measured": measured, "loads": rows, "worst": worst}


def show(result: dict[str, Any]) -> str:
    head = (
        "workers",
        "of capacity",
        "requests/s",
        "p50 real, ms",
        "simulated",
        "off",
        "p99 real, ms",
        "simulated",
        "off",
        "refused real",
        "simulated",
        "machine's load",
    )
    rows = []
    for load in result["loads"]:
        cells = [load["workers"], load["of_capacity"], load["rate"]]
        for name in ("p50", "p99"):
            cells += [load["real"][name], load["simulated"][name], f"{load['off'][name]:+.1%}"]
        rows.append([*cells, load["real"]["refused"], load["simulated"]["refused"], load["load_average"]])
    return f"{table(head, rows)}\nworst: {result['worst']:.1%}, allowed: {ALLOWED:.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.fleet.validation", __doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load (default 30)")
    parser.add_argument("--batch-ms", type=float, default=100.0, help="of a batch of 8 (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1, help="of each load, with arrivals of their own; medians count")
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: result["worst"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
