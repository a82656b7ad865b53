"""Clients that die, dawdle or stop half way, on sockets of their own, with the right picture as the measure."""

import asyncio
import io
import json
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from bench.harness.errors import BenchError
from bench.harness.http_client import Answer, Connection
from bench.robustness.fault import Fault, Seen
from bench.robustness.scenario import PATIENCE_S, RIGHT, Stage, fields_of, label_of
from engines.types import Job

Client = Callable[[Stage], Awaitable[str]]

TOGETHER = 10
SLACK = 8  # open files: the crowd comes and goes
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST, as the kernel does for a killed process with unread data
LARGE = 1024  # pixels of a side, for answers that do not fit into the kernel's buffers
SLOW_READ = 16 * 1024


def request(job: Job) -> bytes:
    body = json.dumps(fields_of(job)).encode()
    head = "POST /generate HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def connected(stage: Stage, receive_bytes: int | None = None) -> socket.socket:
    """A non-blocking connection; `receive_bytes` is what its kernel may hold unread."""
    connection = socket.socket()
    connection.setblocking(False)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", stage.supervisor.port))
    return connection


async def answer_on(connection: socket.socket) -> Answer:
    """What the server still says. Raises OSError or EOFError where it says nothing."""
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        return await Connection(reader, writer, "chaos").answer()
    finally:
        writer.close()


async def killed_client(stage: Stage) -> str:
    """Sends up to a random byte of its request, or all and waits up to 30 ms, or reads a little; then is gone."""
    loop, whole = asyncio.get_running_loop(), request(stage.order(size=stage.rng.choice((64, 256))))
    cut = stage.rng.choice((stage.rng.randrange(len(whole)), len(whole)))
    wait_s, read, reset = stage.rng.uniform(0, 0.03), stage.rng.choice((0, 0, 100)), stage.rng.random() < 0.5
    connection = await connected(stage)
    try:
        await loop.sock_sendall(connection, whole[:cut])
        await asyncio.sleep(wait_s)
        if read and cut == len(whole):
            await loop.sock_recv(connection, read)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    finally:
        connection.close()
    return "left"


async def slow_writer(stage: Stage) -> str:
    """Sends its body in five parts; half of them too slowly for the server's patience with bodies."""
    loop, job = asyncio.get_running_loop(), stage.order()
    head, _, body = request(job).partition(b"\r\n\r\n")
    pause_s, step = stage.rng.choice((0.02, 0.5)), len(body) // 5 + 1
    connection = await connected(stage)
    try:
        await loop.sock_sendall(connection, head + b"\r\n\r\n")
        for first in range(0, len(body), step):
            await asyncio.sleep(pause_s)
            await loop.sock_sendall(connection, body[first : first + step])
    except OSError:
        pass  # refused and closed meanwhile: the answer says so
    return label_of(await answer_on(connection), job)


async def slow_reader(stage: Stage) -> str:
    """Reads a large picture a little at a time."""
    loop, job = asyncio.get_running_loop(), stage.order(size=LARGE)
    connection = await connected(stage, receive_bytes=4096)
    await loop.sock_sendall(connection, request(job))
    received = io.BytesIO()
    while part := await loop.sock_recv(connection, SLOW_READ):
        received.write(part)
        await asyncio.sleep(0.002)
    connection.close()
    head, _, body = received.getvalue().partition(b"\r\n\r\n")
    return label_of(Answer(int(head.split(b" ", 2)[1]), {}, body), job)


async def half_sent(stage: Stage) -> str:
    """Announces a body, sends half, and closes, closes its sending side, or goes silent."""
    loop, whole = asyncio.get_running_loop(), request(stage.order())
    end = stage.rng.choice(("close", "shut", "silent"))
    connection = await connected(stage)
    await loop.sock_sendall(connection, whole[: -stage.rng.randrange(1, 40)])
    if end == "close":
        connection.close()
        return "left"
    if end == "shut":
        connection.shutdown(socket.SHUT_WR)
        received = await loop.sock_recv(connection, SLOW_READ)
        connection.close()
        return f"answered {received[:40]!r}" if received else "closed"
    answer = await answer_on(connection)
    return f"{answer.status} {json.loads(answer.body)['code']}"


def clients(one: Client) -> Callable[[Stage], Awaitable[Seen]]:
    """`one` client after the other, TOGETHER at a time; then nothing of them may be left in the server."""

    async def play(stage: Stage) -> Seen:
        before = await _idle(stage)
        seen: Seen = Counter()
        for first in range(0, stage.count, TOGETHER):
            stage.strike()
            group = [_patiently(one, stage) for _ in range(min(TOGETHER, stage.count - first))]
            seen += Counter(await asyncio.gather(*group))
            await stage.recover()
        left = await _idle(stage, at_most=before + SLACK)
        if left > before + SLACK:
            seen["files left open"] += left - before
        return seen

    return play


async def _patiently(one: Client, stage: Stage) -> str:
    try:
        return await asyncio.wait_for(one(stage), PATIENCE_S)
    except TimeoutError:
        return "silence"
    except (OSError, EOFError, BenchError):
        return "cut"


async def _idle(stage: Stage, at_most: int = 0) -> int:
    """Open files of the server: the fewest seen within a second, or until there are no more than `at_most`."""
    fewest = int((await stage.supervisor.samples())["process_open_fds"])
    for _ in range(20):
        if fewest <= at_most:
            break
        await asyncio.sleep(0.05)
        fewest = min(fewest, int((await stage.supervisor.samples())["process_open_fds"]))
    return fewest


LEFT = frozenset({"left"})
FAULTS = (
    Fault("clients killed at random points", 500, clients(killed_client), hit=LEFT),
    Fault("slow writers", 100, clients(slow_writer), hit=frozenset({RIGHT, "408 body_timeout"})),
    Fault("slow readers", 50, clients(slow_reader)),
    Fault("half-sent bodies", 100, clients(half_sent), hit=LEFT | {"closed", "408 body_timeout"}),
)
