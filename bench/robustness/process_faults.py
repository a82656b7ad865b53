"""Faults of the process and of what is around it: signals, the wall clock, the disk, the checkpoint."""

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
from bench.harness.server_process import ROOT
from bench.robustness.fault import Fault, Seen
from bench.robustness.restarting_server import Supervisor, free_port, ready_label
from bench.robustness.scenario import AGAIN_S, PATIENCE_S, RIGHT, Stage

LONG = 2  # batches of half a second that the engine has to make first
INSIDE = 48  # jobs that wait behind them when the signal comes
DAY = 86_400
JUMPS_S = (3600, -DAY, 10 * 365 * DAY, -20 * 365 * DAY, 1, 0)
DISK_ORDERS = 20  # while the disk is full, each time
LATE = "504 deadline_exceeded"
EXIT_START = 3  # docs/operate/operations.md
CHECKPOINT = ROOT / "models" / "tiny"
NOT_THERE = frozenset({"503 not_ready", "refused", "cut"})
RESTART = NOT_THERE | {RIGHT, "503 draining"}  # a new connection may be cut unheard


def signalled(number: signal.Signals, exit_code: int) -> Callable[[Stage], Awaitable[Seen]]:
    """The signal while INSIDE jobs are accepted and wait behind long ones. Whoever is cut asks again."""

    async def play(stage: Stage) -> Seen:
        seen: Seen = Counter()
        for _ in range(stage.count):
            exits = len(stage.supervisor.codes)
            jobs = [*stage.long_orders(LONG), *(stage.order() for _ in range(INSIDE))]
            accepted = [asyncio.create_task(stage.ask(job)) for job in jobs]
            await stage.accepted(accepted)
            stage.strike()
            stage.supervisor.send(number)
            labels = await asyncio.gather(*accepted)
            seen += Counter(labels)
            code = await stage.supervisor.wait_exit(exits + 1)
            if code != exit_code:
                seen[f"exit code {code}, not {exit_code}"] += 1
            await stage.recover()
            for job, label in zip(jobs, labels, strict=True):
                if label != RIGHT:
                    await stage.insist(job, Counter())
        return seen

    return play


class Clock:
    """The wall clock of a server that clock_shim.c is loaded into."""

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
        """What to start the server with. Raises BenchError where there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise BenchError("a wall clock that jumps needs a C compiler: cc or gcc; name other faults with --only")
        shim = folder / "clock_shim.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(shim), str(Path(__file__).with_name("clock_shim.c")), "-ldl"]
        process = await asyncio.create_subprocess_exec(*command)
        if await process.wait():
            raise BenchError(f"{shlex.join(command)}: ended with code {process.returncode}")
        return {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(self.offset)}


def clock_jumps(clock: Clock) -> Callable[[Stage], Awaitable[Seen]]:
    """The wall clock jumps while jobs wait: one with 30 s left must be made, one with 50 ms must get 504."""

    async def play(stage: Stage) -> Seen:
        seen: Seen = Counter()
        for i in range(stage.count):
            running = [asyncio.create_task(stage.ask(job)) for job in stage.long_orders(2 * LONG)]
            await stage.accepted(running)
            patient = asyncio.create_task(stage.ask(stage.order(), timeout_ms=30_000))
            hasty = asyncio.create_task(stage.ask(stage.order(), timeout_ms=50))
            await asyncio.sleep(AGAIN_S)
            stage.strike()
            seconds = JUMPS_S[i % len(JUMPS_S)]
            clock.set(seconds)
            await stage.recover()
            answer = await stage.supervisor.exchange("POST", "/v1/images/generations", b'{"prompt": "x"}')
            if abs(json.loads(answer.body)["created"] - time.time() - seconds) > PATIENCE_S:
                seen["the clock did not jump"] += 1
            seen += Counter(await asyncio.gather(*running, patient))
            label = await hasty
            seen[label if label == LATE else f"{label}, not {LATE}"] += 1
        clock.set(0)
        return seen

    return play


async def full_disk(stage: Stage) -> Seen:
    """No file may grow any more, so no log line can be written; then there is room again."""
    seen: Seen = Counter()
    log = stage.supervisor.log
    for _ in range(stage.count):
        stage.strike()
        stage.supervisor.limit_files(log.stat().st_size)
        size = log.stat().st_size  # a line may have come before the limit stood
        seen += await stage.together(stage.order() for _ in range(DISK_ORDERS))
        if log.stat().st_size > size:
            seen["the disk was not full"] += 1
        stage.supervisor.lift_limit()
        await stage.recover()
        await asyncio.sleep(AGAIN_S)
        if log.stat().st_size <= size:
            seen["no log line after it"] += 1
    return seen


async def corrupted_checkpoint(stage: Stage) -> Seen:
    """One file of the shipped checkpoint harmed: the start must end with its exit code and one line that says why."""
    seen: Seen = Counter()
    for name, harm in HARMS[: stage.count]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "checkpoint")
            shutil.copytree(CHECKPOINT, checkpoint)
            harm(checkpoint / name, stage.rng)
            seen += await _start(checkpoint, Path(folder, "log"), f"{harm.__name__} {name}")
    stage.strike()
    whole = Supervisor(["--model", str(CHECKPOINT)], stage.supervisor.log)
    await whole.start()
    stage.recovered.append(time.monotonic() - stage.struck)
    await whole.stop()
    return seen


async def _start(checkpoint: Path, log: Path, what: str) -> Seen:
    """What a client sees of a server with this checkpoint until it has left, and what is wrong with how it left."""
    seen: Seen = Counter()
    port = free_port()
    command = [sys.executable, "-m", "server", "--model", str(checkpoint), "--port", str(port)]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=file, stderr=file)
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        seen[await ready_label(port)] += 1
        await asyncio.wait([ended], timeout=0.1)
    said = log.read_text(errors="replace")
    if await ended != EXIT_START:
        seen[f"exit code {process.returncode} of {what}"] += 1
    if "cannot start" not in said or "Traceback" in said:
        seen[f"no plain reason for {what}"] += 1
    return seen


def cut(path: Path, rng: random.Random) -> None:
    """The file ends early."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def garble(path: Path, rng: random.Random) -> None:
    """Its first bytes are random, but for the length of a safetensors header."""
    with path.open("r+b") as file:
        file.seek(8)
        file.write(rng.randbytes(64))


def poison(path: Path, _: random.Random) -> None:
    """Every weight is NaN."""
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:head] + b"\xff" * (len(content) - head))


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


WEIGHTS = "diffusion_pytorch_model.safetensors"
HARMS = (
    (f"transformer/{WEIGHTS}", cut),
    (f"vae/{WEIGHTS}", garble),
    ("text_encoder/model.safetensors", remove),
    (f"vae/{WEIGHTS}", poison),
    ("transformer/config.json", cut),
    ("tokenizer/tokenizer.json", cut),
)


def faults(clock: Clock) -> tuple[Fault, ...]:
    """`clock` is that of the server on which the jumps play."""
    dies = frozenset({RIGHT, "cut"})
    return (
        Fault("SIGTERM under load", 5, signalled(signal.SIGTERM, 0), bystanders=RESTART),
        Fault("SIGKILL under load, restart", 5, signalled(signal.SIGKILL, -9), hit=dies, bystanders=RESTART),
        Fault("clock jumps", 12, clock_jumps(clock), hit=frozenset({RIGHT, LATE}), stage="clock"),
        Fault("full disk", 10, full_disk),
        Fault("corrupted checkpoint", len(HARMS), corrupted_checkpoint, hit=NOT_THERE, crowd=0),
    )
