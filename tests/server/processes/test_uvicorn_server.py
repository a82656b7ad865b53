"""Connections that send too much, too little, too late, nonsense, or do not read."""

import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest
from running_server import Running, Serve, wait_until

import server.processes.uvicorn_server
from server.processes.lingering import LINGER_BYTES
from server.processes.uvicorn_server import HEAD_BYTES


def connect(running: Running) -> socket.socket:
    parts = urlsplit(running.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def everything(connection: socket.socket) -> bytes:
    """Returns the bytes received until the server closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def answer(connection: socket.socket) -> bytes:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.read()


def refusal(received: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)


def test_a_head_without_end_is_refused(plain: Running) -> None:
    enough = LINGER_BYTES + 64 * 2**20  # what the server drops, and more than both systems' buffers hold
    with connect(plain) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-long: ")
        sent = 0
        try:
            while sent < enough:
                sent += connection.send(b"a" * HEAD_BYTES)
        except OSError:
            pass  # closed while we were still sending, which is the point
        assert sent < enough
    assert plain.client.get("/health/live").status_code == 200


def test_a_head_of_a_usual_size_is_taken(plain: Running) -> None:
    assert plain.client.get("/health/live", headers={"cookie": "a" * 16_000}).status_code == 200


def test_many_small_requests_on_one_connection_are_no_long_head(plain: Running) -> None:
    for _ in range(20):
        assert plain.client.get("/health/live", headers={"cookie": "a" * 8000}).status_code == 200


@pytest.mark.parametrize(
    "nonsense", [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"\x16\x03\x01\x02\x00"]
)
def test_nonsense_gets_400(plain: Running, nonsense: bytes) -> None:
    with connect(plain) as connection:
        connection.sendall(nonsense)
        status, body = refusal(everything(connection))
    assert (status, body["title"]) == (400, "Bad Request")


@pytest.mark.parametrize("begun", [b"", b"GET /health/live HTTP/1.1\r\nhost:"])
def test_a_head_that_does_not_come_gets_408(serve: Serve, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.processes.uvicorn_server, "HEAD_S", 0.05)
    running = serve()
    with connect(running) as connection:
        connection.sendall(begun)
        assert refusal(everything(connection))[0] == 408


def test_an_idle_connection_between_requests_is_not_late(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        server.processes.uvicorn_server, "HEAD_S", 2.0
    )  # a busy machine may take a while from connecting to sending
    running = serve()
    request = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(running) as connection:
        connection.sendall(request)
        assert answer(connection) == b'{"status":"live"}'
        connection.settimeout(2.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(request)
        assert answer(connection) == b'{"status":"live"}'


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux drops readers that stopped reading")
def test_a_client_that_stops_reading_is_dropped(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.processes.uvicorn_server, "WRITE_STALL_MS", 300)
    running = serve()
    body = json.dumps({"prompt": "x", "width": 1024, "height": 1024, "num_images": 8}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connections = running.server.server_state.connections
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(running.url)
        before = len(connections)
        connection.connect((parts.hostname, parts.port))
        wait_until(lambda: len(connections) == before + 1)
        connection.sendall(head.encode() + body)
        wait_until(lambda: running.metric("sana_sprint_requests_total", route="/generate", status="200") == 1)
        wait_until(lambda: len(connections) == before, "the end of the connection")
