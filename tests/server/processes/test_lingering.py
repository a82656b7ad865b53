"""A connection that the server closes: its client receives the answer, whatever it still sends."""

import select
import socket
import struct

import pytest
from raw_client import Raw
from running_server import PATIENCE_S, Running, Serve, wait_until

import server.processes.lingering

HANDSHAKE = (
    "GET /v1/live HTTP/1.1",
    "connection: upgrade",
    "upgrade: websocket",
    "sec-websocket-version: 13",
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
)
JSON = "content-type: application/json"
BODY = b'{"prompt": "a red circle"}'
LATE = bytes(1 << 20)  # more than the buffers of a connection that is closed take

CLOSED: dict[str, tuple[int, tuple[str, ...]]] = {
    "handshake with a body": (400, (*HANDSHAKE, f"content-length: {len(LATE)}")),
    "handshake of another site": (403, (*HANDSHAKE, "origin: https://other.example")),
    "handshake without a key": (400, HANDSHAKE[:-1]),
    "handshake to nowhere": (403, ("GET /nowhere HTTP/1.1", *HANDSHAKE[1:])),
    "no HTTP": (400, ("GET /health/live HTTP/9.9",)),
    "long head": (431, ("GET /health/live HTTP/1.1", *(f"x{number}: {'y' * 9000}" for number in range(90)))),
    "tunnel": (405, ("CONNECT example.org:443 HTTP/1.1",)),
    "large body": (413, ("POST /generate HTTP/1.1", JSON, "content-length: 99999999")),
    "method": (405, ("DELETE /generate HTTP/1.1", "transfer-encoding: chunked")),
    "last request": (200, ("GET /health/live HTTP/1.1", "connection: close")),
    "HTTP/1.0": (200, ("GET /health/live HTTP/1.0",)),
}


def await_end(running: Running, before: int) -> None:
    """Waits until the server holds no more connections than before."""
    wait_until(lambda: len(running.server.server_state.connections) <= before, "the end of the connection")


def await_answer(client: Raw) -> None:
    """Waits until the client's system holds the answer, without reading it."""
    assert select.select([client.socket], [], [], PATIENCE_S)[0]


@pytest.mark.parametrize("kind", CLOSED)
def test_a_client_that_still_sends_receives_the_answer(serve: Serve, kind: str) -> None:
    status, lines = CLOSED[kind]
    running = serve()
    before = len(running.server.server_state.connections)
    with Raw(running.url) as raw:
        raw.send(*lines)
        await_answer(raw)
        for _ in range(3):
            raw.socket.sendall(LATE)
        answer = raw.read_response(lines[0].partition(" ")[0])
        assert answer.status == status
        assert raw.closed()
    await_end(running, before)


def test_a_client_that_does_not_leave_loses_its_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.processes.lingering, "LINGER_S", 0.05)
    running = serve()
    before = len(running.server.server_state.connections)
    with Raw(running.url) as raw:
        raw.send("GET /health/live HTTP/1.1", "connection: close")
        assert raw.read_response("GET").status == 200
        await_end(running, before)


def test_a_client_that_sends_without_end_loses_its_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.processes.lingering, "LINGER_S", PATIENCE_S * 10)
    running = serve()
    with Raw(running.url) as raw, pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - until it fails
        raw.send("GET /health/live HTTP/1.1", "connection: close")
        while True:
            raw.socket.sendall(LATE)


def test_a_client_that_resets_is_forgotten(serve: Serve) -> None:
    running = serve()
    before = len(running.server.server_state.connections)
    with Raw(running.url) as raw:
        raw.send(*HANDSHAKE, "content-length: 2")
        await_answer(raw)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await_end(running, before)
