"""A seeded campaign of faults against real servers: what clients saw, what was lost, how long recovery took.

    python -m bench.robustness.chaos
    python -m bench.robustness.chaos --scale 0.02 --only "poisonous job" --only "SIGTERM under load"

Starts `python -m server --backend fake` under a supervisor that starts it again when it ends. While a fault plays, a
small crowd asks for pictures and checks every one. Prints a table, then one JSON document as the last line. Exit code 1
where anything was lost.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.harness.cli import command
from bench.harness.errors import BenchError
from bench.harness.host import machine
from bench.harness.summary import table
from bench.robustness import client_faults, descriptor_faults, engine_faults, process_faults
from bench.robustness.fault import Fault, Row, row
from bench.robustness.process_faults import Clock
from bench.robustness.restarting_server import Supervisor
from bench.robustness.scenario import Stage

# A batch takes 5 ms; a hang shows in two seconds, a body must come within 1.5. The queue holds every accepted job.
FLAGS = (
    *("--backend", "fake", "--fake-delay-ms", "5", "--max-queue", "512", "--log-format", "json"),
    *("--batch-timeout-s", "2", "--body-timeout-s", "1.5", "--shutdown-timeout-s", "30"),
)


def all_faults(clock: Clock) -> tuple[Fault, ...]:
    return (*engine_faults.FAULTS, *client_faults.FAULTS, *process_faults.faults(clock), *descriptor_faults.FAULTS)


async def play(fault: Fault, supervisor: Supervisor, seed: int) -> Row:
    """One row of the table. The same seed makes the same orders, and the same choices of every client."""
    stage = Stage(supervisor, random.Random(f"{seed} {fault.name}"), fault.count)
    await supervisor.wait_ready()
    over = asyncio.Event()
    crowd = asyncio.create_task(stage.crowd(fault.crowd, over))
    try:
        hit = await fault.play(stage)
    finally:
        over.set()
        bystanders = await crowd
    return row(fault, stage, hit, bystanders)


async def campaign(chosen: Sequence[str], scale: float, seed: int, folder: Path) -> list[Row]:
    """A row for each fault, in order. Raises BenchError where a server does not start or does not end."""
    clock = Clock(folder)
    faults = [fault for fault in all_faults(clock) if not chosen or fault.name in chosen]
    servers: dict[str, Supervisor] = {}
    rows = []
    try:
        for fault in faults:
            if fault.stage not in servers:
                environment = await clock.environment(folder) if fault.stage == "clock" else {}
                flags: tuple[str, ...] = (*FLAGS, "--workers", "2") if fault.stage == "workers" else FLAGS
                if fault.stage == "safety":
                    told, environment = engine_faults.install_checkers(folder)
                    flags = (*FLAGS, *told)
                servers[fault.stage] = Supervisor(flags, folder / f"{fault.stage}.log", environment)
                await servers[fault.stage].start()
            scaled = replace(fault, count=max(1, math.ceil(fault.count * scale)))
            rows.append(await play(scaled, servers[fault.stage], seed))
            print(f"{fault.name}: {rows[-1].lost} lost", file=sys.stderr, flush=True)
    finally:
        codes = [await supervisor.stop() for supervisor in servers.values()]
    if any(codes):
        raise BenchError(f"at the end the servers left with {codes}, needed is 0")
    return rows


def show(rows: Sequence[Row]) -> str:
    head = ("fault", "count", "what clients saw", "what others saw", "lost (must be 0)", "time to recover, s")
    cells = [
        [one.fault, one.count, _counted(one.hit), _counted(one.bystanders), one.lost, one.recover_s] for one in rows
    ]
    shown = table(head, cells)
    losses = [f"{one.fault}: {_counted(one.lost_what)}" for one in rows if one.lost]
    return "\n".join([shown, *losses])


def _counted(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{label} x{count}" for label, count in Counter(labels).most_common())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.robustness.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each fault happens (default 1)")
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="this fault; may be repeated")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        known = [fault.name for fault in all_faults(Clock(Path(folder)))]
        if unknown := set(options.only) - set(known):
            parser.error(f"--only: got {', '.join(sorted(unknown))}, allowed: {', '.join(known)}")
        began = time.monotonic()
        try:
            rows = asyncio.run(campaign(options.only, options.scale, options.seed, Path(folder)))
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
    found = {
        "program": "bench.robustness.chaos",
        "command": command("bench.robustness.chaos", arguments),
        "seed": options.seed,
        "machine": machine(),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [asdict(one) for one in rows],
        "lost": sum(one.lost for one in rows),
    }
    print(show(rows))
    print(json.dumps(found))
    return int(found["lost"] != 0)


if __name__ == "__main__":
    sys.exit(main())
