"""Measures overload: open-loop load at a tenth of the capacity, at the capacity, and at four times it.

    python -m bench.load.overload
    python -m bench.load.overload --batch-ms 50 --seconds 20 --cores 0 1

The fake engine takes a fixed time per batch, so the capacity is --max-batch over that time. The queue holds one batch.
Prints a table, then one JSON document as the last line. Exit code 1: a bound is broken. Bounds: accepted p99 < 2 x
unloaded p99 + one batch; refused (429) p99 < 20 ms; goodput at four times >= 95 % of that at capacity.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence

from bench.harness.cli import command
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
) -> dict[str, object]:
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


def broken(unloaded: dict[str, object], full: dict[str, object], over: dict[str, object], batch_ms: float) -> list[str]:
    """Returns a sentence for each bound that does not hold."""
    findings = []
    bound = 2 * _p99(unloaded["accepted_ms"]) + batch_ms
    if _p99(over["accepted_ms"]) >= bound:
        findings.append(f"accepted p99 {_p99(over['accepted_ms']):.1f} ms, must be under {bound:.1f} ms")
    if _p99(over["refused_ms"]) >= REFUSED_MS:
        findings.append(f"refused p99 {_p99(over['refused_ms']):.1f} ms, must be under {REFUSED_MS:g} ms")
    goodput, before = over["goodput"], full["goodput"]
    assert isinstance(goodput, float)
    assert isinstance(before, float)
    if goodput < MIN_GOODPUT_SHARE * before:
        findings.append(f"goodput {goodput:.1f}/s, at capacity it was {before:.1f}/s")
    if lost := sum(int(str(entry["other"])) for entry in (unloaded, full, over)):
        findings.append(f"{lost} requests got neither an image nor 429")
    return findings


def _p99(value: object) -> float:
    return float(value["p99"]) if isinstance(value, dict) else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-ms", type=float, default=100.0, help="time of a batch of 8 (default 100)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load (default 15)")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "CLIENT"), help="pins the two apart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
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
            deadline_ms = 4 * options.batch_ms
            rows.append(summarise(records, share, rate, options.seconds, deadline_ms))
    unloaded, full, over = rows[1:]
    wrong = broken(unloaded, full, over, options.batch_ms)
    print(show([unloaded, full, over]))
    print("\n".join(wrong) if wrong else "every bound holds")
    document = {
        "program": "bench.load.overload",
        "command": command("bench.load.overload", arguments),
        "machine": host_facts(),
    }
    print(json.dumps({**document, "batch_ms": options.batch_ms, "loads": [unloaded, full, over], "broken": wrong}))
    return int(bool(wrong))


def show(rows: Sequence[dict[str, object]]) -> str:
    head = ("load", "requests/s", "goodput/s", "accepted", "p50, ms", "p99, ms", "refused", "p50, ms", "p99, ms")
    cells = []
    for row in rows:
        spreads: list[Percentiles | None] = [row["accepted_ms"], row["refused_ms"]]  # type: ignore[list-item]  # of `measured`
        figures = [
            figure
            for entry in spreads
            for figure in ((entry["count"], entry["p50"], entry["p99"]) if entry else (0, None, None))
        ]
        cells.append([f"{row['of_capacity']:g}x", row["rate"], row["goodput"], *figures])
    return table(head, cells)


if __name__ == "__main__":
    sys.exit(main())
