"""No descriptor left: for the connections of one server, and for the supervisor of several, while a worker dies."""

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
from bench.robustness.client_faults import connected
from bench.robustness.fault import Fault, Seen
from bench.robustness.scenario import PATIENCE_S, RIGHT, Stage

ROOM = 24  # descriptors that are left to a server beside those that it has
IDLE = 64  # connections that then come and say nothing
LINES_S = 2  # of the log, for each second: one would be right, and seconds begin where they like


def lines_of(log: Path, words: str, start: int = 0) -> list[str]:
    """The messages in the log, from that byte on, which hold these words."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if words in line["message"]]


async def idle_crowd(stage: Stage) -> Seen:
    """More connections than the process may hold: who is there is served, who comes waits, the log stays small."""
    seen: Seen = Counter()
    pid, log = stage.supervisor.pid, stage.supervisor.log
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for _ in range(stage.count):
        start, began = log.stat().st_size, time.monotonic()
        stage.strike()
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + ROOM, limits[1]))
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE):
                stack.enter_context(contextlib.closing(await connected(stage)))
            await _until(lambda: bool(lines_of(log, "new connections wait", start)), "a line of the log")  # noqa: B023
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        await stage.recover()
        lines = len(lines_of(log, "new connections wait", start))
        seen["told" if lines <= LINES_S * (time.monotonic() - began + 1) else f"{lines} lines"] += 1
        if b"Traceback" in log.read_bytes()[start:]:
            seen["a traceback"] += 1
    return seen


async def worker_without_a_place(stage: Stage) -> Seen:
    """A worker dies while the supervisor may open nothing; its place must be told, and filled once there is room."""
    seen: Seen = Counter()
    pid, log = stage.supervisor.pid, stage.supervisor.log
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for _ in range(stage.count):
        start = log.stat().st_size
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        stage.strike()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(int(stage.rng.choice(children)), signal.SIGKILL)
        await _until(lambda: bool(lines_of(log, "cannot be started", start)), "a line of the log")  # noqa: B023
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        await _until(lambda: bool(lines_of(log, "is ready", start)), "another worker")  # noqa: B023
        seen["told, and started again"] += 1
        await stage.recover()
    return seen


async def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"{what} did not come within {PATIENCE_S:g} s")
        await asyncio.sleep(0.02)


FAULTS = (
    Fault("more connections than descriptors", 5, idle_crowd, hit=frozenset({"told"})),
    Fault(
        "a worker dies, no descriptor left",
        3,
        worker_without_a_place,
        hit=frozenset({"told, and started again"}),
        bystanders=frozenset({RIGHT, "cut"}),
        stage="workers",
    ),
)
