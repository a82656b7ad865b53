"""Requests that offer another protocol (Upgrade), cut into pieces; the server must answer as if without the offer."""

import asyncio
import json
import random

from bench.harness.http_client import ByteStream, Connection
from bench.robustness.restarting_server import RestartingServer

PROTOCOLS = (
    *("h2c", "h2c, websocket", "websocket", "TLS/1.0", "IRC/6.9, h2c", ""),  # websocket is no offer in a POST
)
CONNECTION = ("Upgrade", "Upgrade, HTTP2-Settings", "keep-alive, upgrade", "HTTP2-Settings,\tUPGRADE")
BODIES = (
    b'{"prompt": "x", "width": 64, "height": 64, "seed": 1}',
    b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"",
)
HANDSHAKE = (
    "GET /v1/live HTTP/1.1\r\nhost: fuzz\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
REQUEST_TIMEOUT_S = 30.0


async def upgrade_case(server: RestartingServer, rng: random.Random) -> str:
    """Sends one or two such requests and a plain one, or a handshake that announces a body."""
    if rng.random() < 0.2:
        announced = rng.choice(("content-length: 2", "transfer-encoding: chunked", "content-length: 9" + "9" * 9))
        head = f"{HANDSHAKE}{announced}\r\n\r\n"
        statuses, closed = await _responses(server, [*_split(head.encode() + b"{}", rng)], 1)
        return "400" if statuses == [400] and closed else f"wrong: {statuses} for a handshake with {announced}"
    chosen = [rng.choice(BODIES) for _ in range(rng.randrange(1, 3))]
    message = b"".join(_request(body, rng) for body in chosen) + b"GET /health/live HTTP/1.1\r\nhost: fuzz\r\n\r\n"
    expected = [200 if body == BODIES[0] else 422 for body in chosen] + [200]
    statuses, _ = await _responses(server, _split(message, rng), len(expected))
    return json.dumps(statuses) if statuses == expected else f"wrong: {statuses}, not {expected}"


def _request(body: bytes, rng: random.Random) -> bytes:
    head = "POST /generate HTTP/1.1\r\nhost: fuzz\r\ncontent-type: application/json\r\n"
    protocol, connection = rng.choice(PROTOCOLS), rng.choice(CONNECTION)
    if protocol:
        head += f"connection: {connection}\r\nupgrade: {protocol}\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n"
    if rng.random() < 0.3 and body:
        chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        return f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunked
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def _split(message: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.randrange(len(message)) for _ in range(rng.randrange(0, 4)))
    return [message[first:last] for first, last in zip([0, *cuts], [*cuts, len(message)], strict=True)]


async def _responses(server: RestartingServer, pieces: list[bytes], count: int) -> tuple[list[int], bool]:
    """Returns the statuses of `count` responses, and whether the connection then ended."""
    stream = await ByteStream.connect("127.0.0.1", server.port)
    connection = Connection(stream, "fuzz")
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            for piece in pieces:
                stream.write(piece)
                await asyncio.sleep(0.001)  # mostly a separate TCP segment
            statuses = [(await connection.read_response()).status for _ in range(count)]
            return statuses, count == 1 and await _ends(stream)
    finally:
        stream.abort()


async def _ends(stream: ByteStream) -> bool:
    """Waits for another byte or the connection's end, and returns whether it ended. Raises OSError."""
    try:
        await stream.read(1)
    except EOFError:
        return True
    return False
