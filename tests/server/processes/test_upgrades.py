"""Offers of another protocol: declined ones are as if not made, a websocket's are answered in any case."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
from collections.abc import Iterator

import pytest
from program import Server
from raw_client import Answered, Raw
from running_server import PATIENCE_S, Serve, wait_until

import server.processes.uvicorn_server

BODY = json.dumps({"prompt": "a red circle", "seed": 7, "width": 64, "height": 64}).encode()
JSON = "content-type: application/json"
LENGTH = f"content-length: {len(BODY)}"
H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA")
KEY = ("sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==")
HANDSHAKE = ("GET /v1/live HTTP/1.1", "connection: upgrade", "upgrade: websocket", *KEY)


@contextlib.contextmanager
def process(*flags: str) -> Iterator[Server]:
    program = Server("--backend", "fake", *flags)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.process.kill()
        program.wait_end()


@pytest.fixture(scope="module", params=["1", "2"], ids=["one", "workers"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with process("--workers", request.param) as program:
        yield program.wait_ready()


@pytest.fixture(scope="module")
def wanted(url: str) -> Answered:
    with Raw(url) as raw:
        raw.send("POST /generate HTTP/1.1", JSON, LENGTH, body=BODY)
        return raw.answer()


OFFERS = [
    H2C,
    ("connection: keep-alive, Upgrade", "upgrade: h2c"),
    ("connection: upgrade", "connection: keep-alive", "upgrade: h2c"),
    ("connection: upgrade", "upgrade: TLS/1.0, h2c"),
    ("connection: upgrade", "upgrade: websocket", *KEY),  # not with a POST
    ("connection: upgrade", "upgrade: h2c, websocket", *KEY),
]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: offer[-1])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_a_declined_offer_is_as_if_not_made(url: str, wanted: Answered, offer: tuple[str, ...], pieces: int) -> None:
    with Raw(url) as raw:
        for _ in range(2):
            first = BODY if pieces == 1 else BODY[: (pieces - 2) * 10]
            raw.send("POST /generate HTTP/1.1", *offer, JSON, LENGTH, body=first)
            raw.socket.sendall(BODY[len(first) :])
            answer = raw.answer()
            assert (answer.status, answer.body) == (200, wanted.body)
        raw.send("GET /health/live HTTP/1.1")
        assert raw.answer("GET").status == 200


def test_a_chunked_body_survives_a_declined_offer(url: str, wanted: Answered) -> None:
    with Raw(url) as raw:
        chunked = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
        raw.send("POST /generate HTTP/1.1", *H2C, JSON, "transfer-encoding: chunked", body=chunked)
        assert raw.answer().body == wanted.body
        raw.send("GET /health/live HTTP/1.1", *H2C)
        assert raw.answer("GET").status == 200


def test_a_body_is_never_parsed_as_a_request(url: str) -> None:
    inner = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    with Raw(url) as raw:
        raw.send("POST /generate HTTP/1.1", *H2C, JSON, f"content-length: {len(inner)}")
        raw.socket.sendall(inner)
        assert raw.answer().status == 422
        raw.send("GET /v1/models HTTP/1.1")
        assert json.loads(raw.answer("GET").body)["object"] == "list"


def test_requests_behind_an_offer_are_served_in_turn(url: str) -> None:
    with Raw(url) as raw:
        one = "\r\n".join(["GET /health/live HTTP/1.1", "host: x", *H2C, "", ""]).encode()
        raw.socket.sendall(one * 20 + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        with raw.socket.makefile("rb") as stream:
            received = b""
            while b'"object":"list"' not in received:
                received += stream.read1()
        assert received.count(b'{"status":"live"}') == 20


def test_an_offer_in_http_1_0_is_ignored(url: str) -> None:
    with Raw(url) as raw:
        raw.send("GET /health/live HTTP/1.0", "connection: upgrade", "upgrade: websocket", *KEY)
        assert raw.answer("GET").body == b'{"status":"live"}'


def test_a_tunnel_is_refused_and_what_follows_is_no_request(url: str) -> None:
    with Raw(url) as raw:
        raw.send("CONNECT example.org:443 HTTP/1.1", body=b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert raw.answer().status == 405
        assert raw.closed()


@pytest.mark.parametrize(
    "announced",
    ["content-length: 2", "transfer-encoding: chunked", "content-length: 99999999"],
)
def test_a_handshake_with_a_body_gets_400(url: str, announced: str) -> None:
    with Raw(url) as raw:
        raw.send(*HANDSHAKE, announced, body=b"{}")
        answer = raw.answer("GET")
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert answer.headers["content-type"] == "application/problem+json"
        assert raw.closed()


def test_a_handshake_that_announces_no_bytes_is_one(url: str) -> None:
    with Raw(url) as raw:
        raw.send(*HANDSHAKE, "content-length: 0")
        assert raw.answer("GET").status == 101


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /v1/live HTTP/1.1", "connection: upgrade", "upgrade: websocket", KEY[0]),
        ("GET /v1/live HTTP/1.1", "connection: upgrade", "upgrade: websocket", KEY[0], "sec-websocket-key: x"),
        (*HANDSHAKE, f"x: {'y' * 9000}"),  # longer than a line may be for the library
        (*HANDSHAKE, *(f"x{number}: y" for number in range(200))),  # more than it takes
    ],
    ids=["no key", "bad key", "long line", "many lines"],
)
def test_a_handshake_that_is_none_is_answered(url: str, lines: tuple[str, ...]) -> None:
    with Raw(url) as raw:
        raw.send(*lines)
        assert raw.answer("GET").status == 400
        assert raw.closed()


def test_a_handshake_that_nobody_answers_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.processes.uvicorn_server, "HANDSHAKE_S", 0.05)
    running = serve()

    async def silent(scope: object, receive: object, send: object) -> None:
        del scope, receive, send
        await stopped.wait()

    stopped = asyncio.Event()
    before = len(running.server.server_state.connections)
    running.server.config.loaded_app, app = silent, running.server.config.loaded_app
    try:
        with Raw(running.url) as raw:
            raw.send(*HANDSHAKE)
            assert raw.answer("GET").status == 503
            assert raw.closed()
        wait_until(lambda: len(running.server.server_state.connections) <= before, "the end of the connection")
    finally:
        running.server.config.loaded_app = app
        loop = running.service.scheduler.loop
        assert loop is not None
        loop.call_soon_threadsafe(stopped.set)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_connection_breaks_the_drain(workers: str) -> None:
    with process("--workers", workers, "--shutdown-timeout-s", "3") as program, contextlib.ExitStack() as stack:
        url = program.wait_ready()
        for lines in [
            (*HANDSHAKE, "content-length: 2"),
            HANDSHAKE,
            ("GET /v1/live HTTP/1.1", "connection: upgrade"),
            ("POST /generate HTTP/1.1", *H2C, JSON, "content-length: 5"),
        ]:
            for _ in range(4):
                stack.enter_context(Raw(url)).send(*lines)
        with Raw(url) as raw:
            raw.send("GET /health/live HTTP/1.1")
            assert raw.answer("GET").status == 200
        program.process.send_signal(signal.SIGTERM)
        assert program.wait_end() == 0, program.output
        assert program.output.count("Finished server process") == int(workers)  # which comes after the app was closed


@pytest.mark.parametrize("workers", ["1", "2"])
def test_handshakes_with_a_body_keep_no_file_open(workers: str) -> None:
    with process("--workers", workers) as program:
        url = program.wait_ready()
        pids = re.findall(r"is ready \(pid (\d+)\)", program.output) or [str(program.process.pid)]

        def files() -> int:
            return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

        before = files()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(url)) for _ in range(60)]
            for client in clients:
                client.send(*HANDSHAKE, "content-length: 2", body=b"{}")
            wait_until(lambda: files() <= before, "the end of the connections", within_s=PATIENCE_S)


def test_the_offer_of_curl_is_served(url: str) -> None:
    """`curl --http2`, which a client library cannot be made to send here."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAoAAA"}
    connection.request("POST", "/generate", BODY, headers | {"content-type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
