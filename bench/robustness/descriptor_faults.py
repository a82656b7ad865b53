"""Descriptor exhaustion: in one server with many connections, and in the supervisor while a worker dies."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.harness.errors import BenchError
from bench.robustness.client_faults import connect
from bench.robustness.fault import Fault, Outcomes
from bench.robustness.scenario import OK, REQUEST_TIMEOUT_S, Scenario

SPARE_DESCRIPTORS = 24  # descriptors left to a server beyond its open ones
IDLE_CONNECTIONS = 64  # connections that send nothing
LOG_LINES_PER_S = 2  # one is expected; seconds may straddle


def lines_of(log: Path, phrase: str, offset: int = 0) -> list[str]:
    """Returns the log's messages from byte `start` on that hold the phrase."""
    text = log.read_bytes()[offset:].decode(errors="replace")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if phrase in line["message"]]


async def too_many_connections(scenario: Scenario) -> Outcomes:
    """Opens more connections than the process may hold.

    Open ones must be served, new ones wait, and the log stays small.
    """
    outcomes: Outcomes = Counter()
    pid, log = scenario.server.pid, scenario.server.log
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for _ in range(scenario.count):
        offset, start_time = log.stat().st_size, time.monotonic()
        scenario.mark_fault()
        open_count = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_count + SPARE_DESCRIPTORS, limits[1]))
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE_CONNECTIONS):
                stack.enter_context(contextlib.closing(await connect(scenario)))
            await _until(lambda: bool(lines_of(log, "new connections wait", offset)), "a line of the log")  # noqa: B023
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        await scenario.wait_recovery()
        lines = len(lines_of(log, "new connections wait", offset))
        outcomes["told" if lines <= LOG_LINES_PER_S * (time.monotonic() - start_time + 1) else f"{lines} lines"] += 1
        if b"Traceback" in log.read_bytes()[offset:]:
            outcomes["a traceback"] += 1
    return outcomes


async def worker_lost_without_descriptors(scenario: Scenario) -> Outcomes:
    """Kills a worker while the supervisor may open nothing.

    The supervisor must log it, and start another worker once it can.
    """
    outcomes: Outcomes = Counter()
    pid, log = scenario.server.pid, scenario.server.log
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for _ in range(scenario.count):
        offset = log.stat().st_size
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        scenario.mark_fault()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(int(scenario.rng.choice(children)), signal.SIGKILL)
        await _until(lambda: bool(lines_of(log, "cannot be started", offset)), "a line of the log")  # noqa: B023
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        await _until(lambda: bool(lines_of(log, "is ready", offset)), "another worker")  # noqa: B023
        outcomes["told, and started again"] += 1
        await scenario.wait_recovery()
    return outcomes


async def _until(condition: Callable[[], bool], event: str) -> None:
    end = time.monotonic() + REQUEST_TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{event} did not come within {REQUEST_TIMEOUT_S:g} s")
        await asyncio.sleep(0.02)


FAULTS = (
    Fault("more connections than descriptors", 5, too_many_connections, hit=frozenset({"told"})),
    Fault(
        "a worker dies, no descriptor left",
        3,
        worker_lost_without_descriptors,
        hit=frozenset({"told, and started again"}),
        bystanders=frozenset({OK, "cut"}),
        server="workers",
    ),
)
