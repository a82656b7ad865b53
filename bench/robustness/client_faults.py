"""Clients that disconnect, stall or stop half way, on raw sockets; they check the image they get."""

import asyncio
import io
import json
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from bench.harness.errors import BenchError
from bench.harness.http_client import ByteStream, Connection, HttpResponse
from bench.robustness.fault import Fault, Outcomes
from bench.robustness.scenario import OK, REQUEST_TIMEOUT_S, Scenario, outcome_label, request_fields
from engines.types import Job

Client = Callable[[Scenario], Awaitable[str]]

CONCURRENCY = 10
OPEN_FILES_SLACK = 8  # background clients come and go
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST, as the kernel does for a killed process with unread data
LARGE = 1024  # pixels of a side, for answers that do not fit into the kernel's buffers
SLOW_READ = 16 * 1024


def request(job: Job) -> bytes:
    body = json.dumps(request_fields(job)).encode()
    head = "POST /generate HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def connect(scenario: Scenario, receive_bytes: int | None = None) -> socket.socket:
    """Returns a non-blocking connection; `receive_bytes` bounds what its kernel holds unread."""
    connection = socket.socket()
    connection.setblocking(False)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", scenario.server.port))
    return connection


async def read_response(connection: socket.socket) -> HttpResponse:
    """Returns the response still sent on the connection. Raises OSError or EOFError without one."""
    stream = await ByteStream.over(connection)
    try:
        return await Connection(stream, "chaos").read_response()
    finally:
        stream.abort()


async def killed_client(scenario: Scenario) -> str:
    """Disconnects after a random byte of its request, after up to 30 ms of waiting, or after reading a little."""
    loop, message = asyncio.get_running_loop(), request(scenario.new_job(size=scenario.rng.choice((64, 256))))
    cut = scenario.rng.choice((scenario.rng.randrange(len(message)), len(message)))
    wait_s, read, reset = scenario.rng.uniform(0, 0.03), scenario.rng.choice((0, 0, 100)), scenario.rng.random() < 0.5
    connection = await connect(scenario)
    try:
        await loop.sock_sendall(connection, message[:cut])
        await asyncio.sleep(wait_s)
        if read and cut == len(message):
            await loop.sock_recv(connection, read)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    finally:
        connection.close()
    return "left"


async def slow_writer(scenario: Scenario) -> str:
    """Sends its body in five parts; half of the clients exceed the server's body timeout."""
    loop, job = asyncio.get_running_loop(), scenario.new_job()
    head, _, body = request(job).partition(b"\r\n\r\n")
    pause_s, step = scenario.rng.choice((0.02, 0.5)), len(body) // 5 + 1
    connection = await connect(scenario)
    try:
        await loop.sock_sendall(connection, head + b"\r\n\r\n")
        for first in range(0, len(body), step):
            await asyncio.sleep(pause_s)
            await loop.sock_sendall(connection, body[first : first + step])
    except OSError:
        pass  # refused and closed meanwhile: the response tells
    return outcome_label(await read_response(connection), job)


async def slow_reader(scenario: Scenario) -> str:
    """Reads a large image a little at a time."""
    loop, job = asyncio.get_running_loop(), scenario.new_job(size=LARGE)
    connection = await connect(scenario, receive_bytes=4096)
    await loop.sock_sendall(connection, request(job))
    received = io.BytesIO()
    while part := await loop.sock_recv(connection, SLOW_READ):
        received.write(part)
        await asyncio.sleep(0.002)
    connection.close()
    head, _, body = received.getvalue().partition(b"\r\n\r\n")
    return outcome_label(HttpResponse(int(head.split(b" ", 2)[1]), {}, body), job)


async def half_sent(scenario: Scenario) -> str:
    """Announces a body, sends half, then closes, closes its sending side, or stays silent."""
    loop, message = asyncio.get_running_loop(), request(scenario.new_job())
    end = scenario.rng.choice(("close", "shut", "silent"))
    connection = await connect(scenario)
    await loop.sock_sendall(connection, message[: -scenario.rng.randrange(1, 40)])
    if end == "close":
        connection.close()
        return "left"
    if end == "shut":
        connection.shutdown(socket.SHUT_WR)
        received = await loop.sock_recv(connection, SLOW_READ)
        connection.close()
        return f"answered {received[:40]!r}" if received else "closed"
    response = await read_response(connection)
    return f"{response.status} {json.loads(response.body)['code']}"


def client_scenario(client: Client) -> Callable[[Scenario], Awaitable[Outcomes]]:
    """Runs clients, CONCURRENCY at a time, then checks that the server keeps no file of them open."""

    async def run(scenario: Scenario) -> Outcomes:
        before = await _open_files(scenario)
        outcomes: Outcomes = Counter()
        for first in range(0, scenario.count, CONCURRENCY):
            scenario.mark_fault()
            group = [_with_timeout(client, scenario) for _ in range(min(CONCURRENCY, scenario.count - first))]
            outcomes += Counter(await asyncio.gather(*group))
            await scenario.wait_recovery()
        remaining = await _open_files(scenario, at_most=before + OPEN_FILES_SLACK)
        if remaining > before + OPEN_FILES_SLACK:
            outcomes["files left open"] += remaining - before
        return outcomes

    return run


async def _with_timeout(client: Client, scenario: Scenario) -> str:
    try:
        return await asyncio.wait_for(client(scenario), REQUEST_TIMEOUT_S)
    except TimeoutError:
        return "silence"
    except (OSError, EOFError, BenchError):
        return "cut"


async def _open_files(scenario: Scenario, at_most: int = 0) -> int:
    """Returns the server's fewest open files within a second, or until they are at most `at_most`."""
    fewest = int((await scenario.server.metrics())["process_open_fds"])
    for _ in range(20):
        if fewest <= at_most:
            break
        await asyncio.sleep(0.05)
        fewest = min(fewest, int((await scenario.server.metrics())["process_open_fds"]))
    return fewest


LEFT = frozenset({"left"})
FAULTS = (
    Fault("clients killed at random points", 500, client_scenario(killed_client), hit=LEFT),
    Fault("slow writers", 100, client_scenario(slow_writer), hit=frozenset({OK, "408 body_timeout"})),
    Fault("slow readers", 50, client_scenario(slow_reader)),
    Fault("half-sent bodies", 100, client_scenario(half_sent), hit=LEFT | {"closed", "408 body_timeout"}),
)
