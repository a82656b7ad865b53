"""Measures overload: open-loop load at a tenth of the capacity, at the capacity, and at four times it.

    python -m bench.load.overload
    python -m bench.load.overload --batch-ms 50 --seconds 20 --cores 0 1

The fake engine takes a fixed time per batch, so the capacity is --max-batch over that time. The queue holds one batch.
Prints a table, then one JSON document as the last line. Exit code 1: a bound is broken. Bounds: accepted p99 < 2 x
unloaded p99 + one batch; refused (429) p99 < 20 ms; goodput at four times >= 95 % of that at capacity.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.host import host_facts
from bench.harness.load_generator import ImageRequest, LoadGenerator, RequestRecord
from bench.harness.server_process import running_server
from bench.harness.summary import Percentiles, percentiles, table

BATCH = 8
UNLOADED, OVER = 0.1, 4.0  # of the capacity
REFUSED_MS = 20.0
MIN_GOODPUT_SHARE = 0.95
SIDE = 64


async def load(url: str, rate: float, seconds: float, seed: int) -> list[RequestRecord]:
    requests = [
        ImageRequest("a red circle", seed * 10**6 + i, 1, "jpeg", SIDE, SIDE) for i in range(int(rate * seconds))
    ]
    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool)
        try:
            return await generator.open_loop(requests, rate, seed)
        finally:
            await generator.close()


def summarise(
    records: Sequence[RequestRecord], share: float, rate: float, seconds: float, deadline_ms: float
) -> dict[str, Any]:
    """Returns one load's row: milliseconds, images a second."""
    good = [1000 * record.seconds for record in records if record.status == 200]
    refused = [1000 * record.seconds for record in records if record.status == 429]
    return {
        "of_capacity": share,
        "rate": round(rate, 1),
        "requests": len(records),
        "accepted_ms": percentiles(good),
        "refused_ms": percentiles(refused),
        "other": sum(record.status not in (200, 429) for record in records),
        "goodput": round(sum(ms <= deadline_ms for ms in good) / seconds, 2),
        "generator_late_ms": percentiles([1000 * record.send_delay_s for record in records]),
    }


def broken(unloaded: dict[str, Any], full: dict[str, Any], over: dict[str, Any], batch_ms: float) -> list[str]:
    """Returns a sentence for each bound that does not hold."""
    findings = []
    bound = 2 * _p99(unloaded["accepted_ms"]) + batch_ms
    if _p99(over["accepted_ms"]) >= bound:
        findings.append(f"accepted p99 {_p99(over['accepted_ms']):.1f} ms, must be under {bound:.1f} ms")
    if _p99(over["refused_ms"]) >= REFUSED_MS:
        findings.append(f"refused p99 {_p99(over['refused_ms']):.1f} ms, must be under {REFUSED_MS:g} ms")
    if over["goodput"] < MIN_GOODPUT_SHARE * full["goodput"]:
        findings.append(f"goodput {over['goodput']:.1f}/s, at capacity it was {full['goodput']:.1f}/s")
    if lost := sum(row["other"] for row in (unloaded, full, over)):
        findings.append(f"{lost} requests got neither an image nor 429")
    return findings


def _p99(value: Percentiles | None) -> float:
    return value["p99"] if value else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError if the server does not start or stop."""
    capacity = 1000 * BATCH / options.batch_ms
    flags = ["--backend", "fake", "--fake-delay-ms", str(options.batch_ms), "--max-batch", str(BATCH)]
    flags += ["--max-queue", str(BATCH), "--log-level", "warning"]
    rows = []
    with running_server(flags) as server:
        if options.cores:
            os.sched_setaffinity(server.process.pid, {options.cores[0]})
            os.sched_setaffinity(0, {options.cores[1]})
        for share in (UNLOADED, UNLOADED, 1.0, OVER):  # the first warms up
            rate = share * capacity
            records = asyncio.run(load(server.url, rate, options.seconds, options.seed))
            rows.append(summarise(records, share, rate, options.seconds, 4 * options.batch_ms))
    unloaded, full, over = rows[1:]
    document = {"program": "bench.load.overload", "command": options.command, "machine": host_facts()}
    findings = broken(unloaded, full, over, options.batch_ms)
    return {**document, "batch_ms": options.batch_ms, "loads": rows[1:], "broken": findings}


def show(result: dict[str, Any]) -> str:
    """Returns the table for people, and the broken bounds."""
    head = ("load", "requests/s", "goodput/s", "accepted", "p50, ms", "p99, ms", "refused", "p50, ms", "p99, ms")
    cells = []
    for row in result["loads"]:
        figures: list[object] = []
        for values in (row["accepted_ms"], row["refused_ms"]):
            figures += [values["count"], values["p50"], values["p99"]] if values else [0, None, None]
        cells.append([f"{row['of_capacity']:g}x", row["rate"], row["goodput"], *figures])
    return "\n".join([table(head, cells), *(result["broken"] or ["every bound holds"])])


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.load.overload", __doc__)
    parser.add_argument("--batch-ms", type=float, default=100.0, help="time of a batch of 8 (default 100)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default 15)")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "CLIENT"), help="pins the two apart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, lambda result: result["broken"])


if __name__ == "__main__":
    sys.exit(main())
