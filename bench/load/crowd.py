"""Measures a crowd: thousands of idle connections beside a few busy clients, then hundreds of live sessions.

    python -m bench.load.crowd
    python -m bench.load.crowd --connections 1000 --sessions 50 --seconds 5

The server runs the fake engine. Each idle connection asks once, stays open while the busy clients run, and asks again:
one without an answer is lost. Each live session sends drawings at a fixed rate. A drawing counts from when it was due
until an image shows it or a newer one; without such an image it is lost.

Prints a table, then one JSON document as the last line. Exit code 1: something was lost. Client and server each need a
descriptor for each connection (ulimit -n).
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil
from websockets.asyncio.client import ClientConnection, connect

from bench.harness.cli import BenchmarkParser, run_benchmark
from bench.harness.errors import BenchError
from bench.harness.host import host_facts
from bench.harness.http_client import ByteStream, Connection
from bench.harness.load_generator import ImageRequest, LoadGenerator
from bench.harness.server_process import RunningServer, running_server
from bench.harness.summary import percentiles, table
from bench.load.soak.requests import drawing_file

CLIENTS = 8  # busy ones, in a closed loop
AT_ONCE = 100  # connections that open at the same time
HANDSHAKES_PER_S = 100  # of live sessions
SIDE = 64
PATIENCE_S = 30.0


async def busy(url: str, seconds: float) -> dict[str, Any]:
    """Runs the busy clients; returns milliseconds, images a second and lost requests."""
    deadline = time.perf_counter() + seconds

    def requests() -> Iterator[ImageRequest]:
        seed = 0
        while time.perf_counter() < deadline:
            yield ImageRequest("a red circle", seed, 1, "jpeg", SIDE, SIDE)
            seed += 1

    with tempfile.TemporaryFile() as spool:
        generator = LoadGenerator(url, spool, timeout_s=PATIENCE_S)
        try:
            records = await generator.closed_loop(requests(), CLIENTS)
        finally:
            await generator.close()
    good = [1000 * record.seconds for record in records if record.status == 200]
    return {"ms": percentiles(good), "per_s": round(len(good) / seconds, 1), "lost": len(records) - len(good)}


async def beside_idle_connections(server: RunningServer, count: int, seconds: float) -> dict[str, Any]:
    """Runs the busy clients alone, then beside `count` idle connections; returns both, and the cost of a connection."""
    process = psutil.Process(server.process.pid)
    await busy(server.url, min(seconds, 2.0))
    alone = await busy(server.url, seconds)
    memory = process.memory_info().rss
    began = time.perf_counter()
    opened = await _in_turns(lambda: _opened(server.url), count)
    idle = [connection for connection in opened if connection is not None]
    opening_s = time.perf_counter() - began
    beside = await busy(server.url, seconds)
    answers = await _in_turns(lambda: _asks(idle.pop()), len(idle))
    return {
        "connections": count,
        "opened_per_s": round(count / opening_s, 1),
        "kib_per_connection": round((process.memory_info().rss - memory) / 1024 / count, 2),
        "alone": alone,
        "beside": beside,
        "lost": count - sum(answers),
    }


async def _in_turns(work: Callable[[], Awaitable[Any]], count: int) -> list[Any]:
    """Runs `work` `count` times, at most AT_ONCE at the same time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> Any:
        async with room:
            return await work()

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def _opened(url: str) -> Connection | None:
    """Returns a connection that has had its first answer; None without one."""
    parts = urlsplit(url)
    try:
        stream = await ByteStream.connect(parts.hostname or "", parts.port or 80)
    except OSError:
        return None
    connection = Connection(stream, parts.netloc)
    return connection if await _answers(connection) else None


async def _asks(connection: Connection) -> bool:
    try:
        return await _answers(connection)
    finally:
        await connection.close()


async def _answers(connection: Connection) -> bool:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return (await connection.exchange("GET", "/health/live")).status == 200
    except (OSError, EOFError, TimeoutError, BenchError):
        return False


async def live(url: str, sessions: int, rate: float, seconds: float) -> dict[str, Any]:
    """Runs live sessions that each send `rate` drawings a second; returns milliseconds to an image, and losses."""
    address = url.replace("http", "ws", 1) + "/v1/live"
    ready, start = [0], asyncio.Event()
    results = asyncio.gather(
        *(_session(address, seed, rate, seconds, ready, start) for seed in range(sessions)),
        return_exceptions=True,
    )
    while ready[0] < sessions and not results.done():
        await asyncio.sleep(0.05)
    start.set()
    waits, lost, broken = list[float](), 0, 0
    for result in await results:
        if isinstance(result, BaseException):
            broken += 1
        else:
            waits += result[0]
            lost += result[1]
    return {
        "sessions": sessions,
        "drawings_per_s": round(sessions * rate, 1),
        "ms": percentiles(waits),
        "lost": lost,
        "broken": broken,
    }


async def _session(
    address: str, seed: int, rate: float, seconds: float, ready: list[int], start: asyncio.Event
) -> tuple[list[float], int]:
    """Returns milliseconds from each drawing to its image, and the number of drawings without one."""
    rng = random.Random(seed)
    await asyncio.sleep(seed / HANDSHAKES_PER_S)
    due: dict[int, float] = {}
    waits: list[float] = []
    async with connect(address, proxy=None, max_size=2**24, compression=None, open_timeout=PATIENCE_S) as socket:
        await socket.recv()  # ready
        await socket.send(json.dumps({"prompt": "a red circle", "width": SIDE, "height": SIDE, "mode": "image"}))
        ready[0] += 1
        await start.wait()
        receiver = asyncio.create_task(_receive(socket, due, waits))
        at = time.perf_counter() + rng.uniform(0, 1 / rate)
        for sequence in range(2, 2 + max(1, round(rate * seconds))):
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            due[sequence] = at
            await socket.send(drawing_file(rng)[0])
            at += 1 / rate
        ends = time.perf_counter() + PATIENCE_S
        while due and time.perf_counter() < ends and not receiver.done():
            await asyncio.sleep(0.05)
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)
    return waits, len(due)


async def _receive(socket: ClientConnection, due: dict[int, float], waits: list[float]) -> None:
    """Moves each drawing that an image shows from `due` to `waits`."""
    while True:
        header = json.loads(await socket.recv())
        if header["type"] == "picture":
            await socket.recv()
            now = time.perf_counter()
            for sequence in [sequence for sequence in due if sequence <= header["sequence"]]:
                waits.append(1000 * (now - due.pop(sequence)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON document. Raises BenchError if the server does not start or stop."""
    flags = ["--backend", "fake", "--fake-delay-ms", str(options.batch_ms), "--max-batch", "8"]
    flags += ["--live-sessions", str(options.sessions), "--log-level", "warning", "--max-queue", "4096"]
    document: dict[str, Any] = {"program": "bench.load.crowd", "command": options.command, "machine": host_facts()}
    with running_server(flags) as server:
        document["idle"] = asyncio.run(beside_idle_connections(server, options.connections, options.seconds))
        document["live"] = asyncio.run(live(server.url, options.sessions, options.drawings, options.seconds))
    return document


def is_lost(result: dict[str, Any]) -> bool:
    """Returns whether an answer, a connection, a session or a drawing was lost."""
    idle, sessions = result["idle"], result["live"]
    return any([idle["lost"], idle["alone"]["lost"], idle["beside"]["lost"], sessions["lost"], sessions["broken"]])


def show(result: dict[str, Any]) -> str:
    """Returns the table for people."""
    idle, sessions = result["idle"], result["live"]
    rows: list[list[object]] = []
    for name, part in (("alone", idle["alone"]), (f"beside {idle['connections']} idle connections", idle["beside"])):
        rows.append([f"{CLIENTS} clients, {name}", part["per_s"], *_figures(part), part["lost"]])
    lost = f"{sessions['lost']} drawings, {sessions['broken']} sessions"
    rows.append([f"{sessions['sessions']} live sessions", sessions["drawings_per_s"], *_figures(sessions), lost])
    facts = (
        f"{idle['opened_per_s']} connections opened a second, {idle['kib_per_connection']} KiB each; "
        f"{idle['lost']} idle ones lost"
    )
    return "\n".join([table(("load", "per second", "p50, ms", "p99, ms", "max, ms", "lost"), rows), facts])


def _figures(part: dict[str, Any]) -> list[object]:
    values = part["ms"]
    return [values["p50"], values["p99"], values["max"]] if values else [None] * 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = BenchmarkParser("bench.load.crowd", __doc__)
    parser.add_argument("--connections", type=int, default=10_000, help="idle ones (default 10000)")
    parser.add_argument("--sessions", type=int, default=500, help="live ones (default 500)")
    parser.add_argument("--drawings", type=float, default=0.5, help="a second, of each session (default 0.5)")
    parser.add_argument("--batch-ms", type=float, default=5.0, help="time of a batch of 8 (default 5)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load (default 20)")
    options = parser.options(argv)
    return run_benchmark(lambda: measure(options), show, is_lost)


if __name__ == "__main__":
    sys.exit(main())
