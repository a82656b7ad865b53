"""Injects seeded faults into real servers and reports client outcomes, losses and recovery times.

    python -m bench.robustness.chaos
    python -m bench.robustness.chaos --scale 0.02 --only "poisonous job" --only "SIGTERM under load"

Starts `python -m server --backend fake` and restarts it when it ends. During a fault a few background clients request
images and check every one. Prints a table, then one JSON document as the last line. Exit code 1: something was lost.
"""

import argparse
import asyncio
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.summary import counted, table
from bench.robustness import client_faults, descriptor_faults, engine_faults, process_faults
from bench.robustness.fault import Fault, FaultResult, fault_result
from bench.robustness.process_faults import Clock
from bench.robustness.restarting_server import RestartingServer
from bench.robustness.scenario import Scenario

# A batch takes 5 ms; a hang shows in two seconds, a body must come within 1.5. The queue holds every accepted job.
FLAGS = (
    *("--backend", "fake", "--fake-delay-ms", "5", "--max-queue", "512", "--log-format", "json"),
    *("--batch-timeout-s", "2", "--body-timeout-s", "1.5", "--shutdown-timeout-s", "30"),
    *("--fast-decoder", "lite", "--lora", "ring=none", "--compat", "sdapi"),
)


def all_faults(clock: Clock) -> tuple[Fault, ...]:
    return (*engine_faults.FAULTS, *client_faults.FAULTS, *process_faults.faults(clock), *descriptor_faults.FAULTS)


async def run_scenario(fault: Fault, server: RestartingServer, seed: int) -> FaultResult:
    """Runs one fault and returns its row. A seed fixes the requests and the choices of every client."""
    scenario = Scenario(server, random.Random(f"{seed} {fault.name}"), fault.count, varied=True)
    await server.wait_ready()
    done = asyncio.Event()
    background_clients = asyncio.create_task(scenario.background_clients(fault.background_clients, done))
    try:
        hit = await fault.run(scenario)
    finally:
        done.set()
        bystanders = await background_clients
    return fault_result(fault, scenario, hit, bystanders)


async def campaign(chosen: Sequence[str], scale: float, seed: int, folder: Path) -> list[FaultResult]:
    """Returns a row for each fault, in order. Raises BenchError if a server does not start or does not end."""
    clock = Clock(folder)
    faults = [fault for fault in all_faults(clock) if not chosen or fault.name in chosen]
    servers: dict[str, RestartingServer] = {}
    rows = []
    try:
        for fault in faults:
            if fault.server not in servers:
                environment = await clock.environment(folder) if fault.server == "clock" else {}
                flags: tuple[str, ...] = (*FLAGS, "--workers", "2") if fault.server == "workers" else FLAGS
                if fault.server == "safety":
                    safety_flags, environment = engine_faults.install_checkers(folder)
                    flags = (*FLAGS, *safety_flags)
                servers[fault.server] = RestartingServer(flags, folder / f"{fault.server}.log", environment)
                await servers[fault.server].start()
            scaled = replace(fault, count=max(1, math.ceil(fault.count * scale)))
            rows.append(await run_scenario(scaled, servers[fault.server], seed))
            print(f"{fault.name}: {rows[-1].lost} lost", file=sys.stderr, flush=True)
    finally:
        exit_codes = [await server.stop() for server in servers.values()]
    if any(exit_codes):
        raise BenchError(f"at the end the servers left with {exit_codes}, needed is 0")
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError as `campaign` does."""
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(campaign(options.only, options.scale, options.seed, Path(folder)))
    return {
        "program": "bench.robustness.chaos",
        "command": options.command,
        "seed": options.seed,
        "machine": host_facts(),
        "seconds": round(time.monotonic() - start_time, 1),
        "rows": [asdict(row) for row in rows],
        "lost": sum(row.lost for row in rows),
    }


def show(result: Mapping[str, Any]) -> str:
    """Returns the table for people, and a line for each fault with losses."""
    head = ("fault", "count", "what clients saw", "what others saw", "lost (must be 0)", "time to recover, s")
    cells = [
        [row["fault"], row["count"], counted(row["hit"]), counted(row["bystanders"]), row["lost"], row["recover_s"]]
        for row in result["rows"]
    ]
    losses = [f"{row['fault']}: {counted(row['lost_what'])}" for row in result["rows"] if row["lost"]]
    return "\n".join([table(head, cells), *losses])


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.robustness.chaos", __doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each fault happens (default 1)")
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="this fault; may be repeated")
    options = parser.options(argv)
    with tempfile.TemporaryDirectory() as folder:
        known = [fault.name for fault in all_faults(Clock(Path(folder)))]
    if unknown := set(options.only) - set(known):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, allowed: {', '.join(known)}")
    return run_benchmark(lambda: measure(options), show, lambda result: result["lost"])


if __name__ == "__main__":
    sys.exit(main())
