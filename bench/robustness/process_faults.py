"""Faults of the process and its surroundings: signals, wall clock, disk, checkpoint."""

import asyncio
import json
import os
import random
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.harness.errors import BenchError
from bench.harness.server_process import ROOT, free_port
from bench.robustness.fault import Fault, Outcomes
from bench.robustness.restarting_server import RestartingServer, ready_label
from bench.robustness.scenario import OK, REQUEST_TIMEOUT_S, RETRY_PAUSE_S, Scenario

SLOW_BATCHES = 2  # batches of half a second that run first
QUEUED_JOBS = 48  # jobs behind them when the signal arrives
DAY = 86_400
JUMPS_S = (3600, -DAY, 10 * 365 * DAY, -20 * 365 * DAY, 1, 0)
FULL_DISK_REQUESTS = 20  # while the disk is full, each time
DEADLINE_EXCEEDED = "504 deadline_exceeded"
EXIT_START = 3  # docs/operate/operations.md
CHECKPOINT = ROOT / "models" / "tiny"
UNAVAILABLE = frozenset({"503 not_ready", "refused", "cut"})
RESTARTING = UNAVAILABLE | {OK, "503 draining"}  # a new connection may be cut


def signal_under_load(signal_number: signal.Signals, exit_code: int) -> Callable[[Scenario], Awaitable[Outcomes]]:
    """Sends the signal while QUEUED_JOBS accepted jobs wait behind slow ones. Clients that are cut retry."""

    async def run(scenario: Scenario) -> Outcomes:
        outcomes: Outcomes = Counter()
        for _ in range(scenario.count):
            exits = len(scenario.server.exit_codes)
            jobs = [*scenario.slow_jobs(SLOW_BATCHES), *(scenario.new_job() for _ in range(QUEUED_JOBS))]
            tasks = [asyncio.create_task(scenario.ask(job)) for job in jobs]
            await scenario.wait_accepted(tasks)
            scenario.mark_fault()
            scenario.server.send_signal(signal_number)
            labels = await asyncio.gather(*tasks)
            outcomes += Counter(labels)
            code = await scenario.server.wait_for_exit(exits + 1)
            if code != exit_code:
                outcomes[f"exit code {code}, not {exit_code}"] += 1
            await scenario.wait_recovery()
            for job, label in zip(jobs, labels, strict=True):
                if label != OK:
                    await scenario.request_until_ok(job, Counter())
        return outcomes

    return run


class Clock:
    """Sets the wall clock of a server that has loaded clock_shim.c."""

    def __init__(self, folder: Path) -> None:
        self.offset = folder / "offset"
        self.set(0)

    def set(self, seconds: int) -> None:
        if self.offset.exists():
            with self.offset.open("r+b") as file:  # the same file, which the server has mapped
                file.write(struct.pack("=q", seconds))
        else:
            self.offset.write_bytes(struct.pack("=q", seconds))

    async def environment(self, folder: Path) -> dict[str, str]:
        """Builds the shim; returns the server's environment. Raises BenchError without a C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise BenchError("a wall clock that jumps needs a C compiler: cc or gcc; name other faults with --only")
        shim = folder / "clock_shim.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(shim), str(Path(__file__).with_name("clock_shim.c")), "-ldl"]
        process = await asyncio.create_subprocess_exec(*command)
        if await process.wait():
            raise BenchError(f"{shlex.join(command)}: ended with code {process.returncode}")
        return {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(self.offset)}


def clock_jumps(clock: Clock) -> Callable[[Scenario], Awaitable[Outcomes]]:
    """Moves the wall clock while jobs wait: one with 30 s left must succeed, one with 50 ms must get 504."""

    async def run(scenario: Scenario) -> Outcomes:
        outcomes: Outcomes = Counter()
        for i in range(scenario.count):
            running = [asyncio.create_task(scenario.ask(job)) for job in scenario.slow_jobs(2 * SLOW_BATCHES)]
            await scenario.wait_accepted(running)
            long_deadline = asyncio.create_task(scenario.ask(scenario.new_job(), timeout_ms=30_000))
            short_deadline = asyncio.create_task(scenario.ask(scenario.new_job(), timeout_ms=50))
            await asyncio.sleep(RETRY_PAUSE_S)
            scenario.mark_fault()
            seconds = JUMPS_S[i % len(JUMPS_S)]
            clock.set(seconds)
            await scenario.wait_recovery()
            response = await scenario.server.exchange("POST", "/v1/images/generations", b'{"prompt": "x"}')
            if abs(json.loads(response.body)["created"] - time.time() - seconds) > REQUEST_TIMEOUT_S:
                outcomes["the clock did not jump"] += 1
            outcomes += Counter(await asyncio.gather(*running, long_deadline))
            label = await short_deadline
            outcomes[label if label == DEADLINE_EXCEEDED else f"{label}, not {DEADLINE_EXCEEDED}"] += 1
        clock.set(0)
        return outcomes

    return run


async def full_disk(scenario: Scenario) -> Outcomes:
    """Bounds the size of files, so that no log line can be written, and lifts the bound again."""
    outcomes: Outcomes = Counter()
    log = scenario.server.log
    for _ in range(scenario.count):
        scenario.mark_fault()
        scenario.server.limit_files(log.stat().st_size)
        first, *rest = (scenario.new_job() for _ in range(FULL_DISK_REQUESTS))
        outcomes += await scenario.request_all([first])
        size = log.stat().st_size  # lines may have come before the limit stood
        outcomes += await scenario.request_all(rest)
        if log.stat().st_size > size:
            outcomes["the disk was not full"] += 1
        scenario.server.lift_limit()
        await scenario.wait_recovery()
        await asyncio.sleep(RETRY_PAUSE_S)
        if log.stat().st_size <= size:
            outcomes["no log line after it"] += 1
    return outcomes


async def corrupted_checkpoint(scenario: Scenario) -> Outcomes:
    """Damages one file of the shipped checkpoint at a time.

    The start must fail with its exit code and a one-line reason.
    """
    outcomes: Outcomes = Counter()
    for name, damage in DAMAGES[: scenario.count]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "checkpoint")
            shutil.copytree(CHECKPOINT, checkpoint)
            damage(checkpoint / name, scenario.rng)
            outcomes += await _start_damaged(checkpoint, Path(folder, "log"), f"{damage.__name__} {name}")
    scenario.mark_fault()
    whole = RestartingServer(["--model", str(CHECKPOINT)], scenario.server.log)
    await whole.start()
    scenario.recovery_s.append(time.monotonic() - scenario.fault_time)
    await whole.stop()
    return outcomes


async def _start_damaged(checkpoint: Path, log: Path, damage_name: str) -> Outcomes:
    """Returns a client's outcomes until the server has exited, and faults of how it exited."""
    outcomes: Outcomes = Counter()
    port = free_port()
    command = [sys.executable, "-m", "server", "--model", str(checkpoint), "--port", str(port)]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=file, stderr=file)
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        outcomes[await ready_label(port)] += 1
        await asyncio.wait([ended], timeout=0.1)
    log_text = log.read_text(errors="replace")
    if await ended != EXIT_START:
        outcomes[f"exit code {process.returncode} of {damage_name}"] += 1
    if "cannot start" not in log_text or "Traceback" in log_text:
        outcomes[f"no plain reason for {damage_name}"] += 1
    return outcomes


def cut(path: Path, rng: random.Random) -> None:
    """Truncates the file."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def overwrite_head(path: Path, rng: random.Random) -> None:
    """Overwrites the first bytes behind the length of a safetensors header with random ones."""
    with path.open("r+b") as file:
        file.seek(8)
        file.write(rng.randbytes(64))


def fill_with_nan(path: Path, _: random.Random) -> None:
    """Sets every weight to NaN."""
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:head] + b"\xff" * (len(content) - head))


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = (
    (f"transformer/{WEIGHTS}", cut),
    (f"vae/{WEIGHTS}", overwrite_head),
    ("text_encoder/model.safetensors", remove),
    (f"vae/{WEIGHTS}", fill_with_nan),
    ("transformer/config.json", cut),
    ("tokenizer/tokenizer.json", cut),
)


def faults(clock: Clock) -> tuple[Fault, ...]:
    """Returns the scenarios; `clock` is the one of the server whose clock jumps."""
    killed = frozenset({OK, "cut"})
    return (
        Fault("SIGTERM under load", 5, signal_under_load(signal.SIGTERM, 0), bystanders=RESTARTING),
        Fault(
            "SIGKILL under load, restart", 5, signal_under_load(signal.SIGKILL, -9), hit=killed, bystanders=RESTARTING
        ),
        Fault("clock jumps", 12, clock_jumps(clock), hit=frozenset({OK, DEADLINE_EXCEEDED}), server="clock"),
        Fault("full disk", 10, full_disk),
        Fault("corrupted checkpoint", len(DAMAGES), corrupted_checkpoint, hit=UNAVAILABLE, background_clients=0),
    )
