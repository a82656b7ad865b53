"""The head of an answer and a short body leave in one write; nothing else is held up."""

import asyncio
from dataclasses import dataclass

import pytest
from raw_client import Raw
from running_server import Running, Serve

import server.processes.uvicorn_server
from server.processes.head_buffer import JOINED_BYTES, Answer, HeadBuffer

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@dataclass
class Started:
    response_started: bool = True


class Recorder(asyncio.Transport):
    """Keeps what is written, and writes it on to `target`."""

    def __init__(self, target: asyncio.Transport | None = None) -> None:
        super().__init__()
        self.target = target
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        if self.target is not None:
            self.target.write(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def written(*parts: bytes, started: bool = True, close: bool = False) -> list[bytes]:
    """Returns what reaches the socket until the next turn of the event loop, or until a close in the same turn."""

    async def write() -> list[bytes]:
        recorder = Recorder()
        buffer = HeadBuffer(recorder, Started(started))
        for part in parts:
            buffer.write(part)
        if close:
            buffer.close()
            assert buffer.is_closing()
        else:
            await asyncio.sleep(0)
        return recorder.writes

    return asyncio.run(write())


def test_a_head_and_its_body_are_one_write() -> None:
    assert written(HEAD, b"body", b"more", close=True) == [HEAD + b"body", b"more"]


def test_a_long_body_is_not_copied() -> None:
    long = b"x" * (JOINED_BYTES + 1)
    assert written(HEAD, long, b"more", close=True) == [HEAD, long, b"more"]


def test_a_head_waits_at_most_to_the_next_turn() -> None:
    assert written(HEAD) == [HEAD]


def test_a_head_without_a_body_leaves_before_the_close() -> None:
    assert written(HEAD, close=True) == [HEAD]


def test_what_precedes_an_answer_is_sent_at_once() -> None:
    assert written(b"HTTP/1.1 100 Continue\r\n\r\n", started=False, close=True) == [b"HTTP/1.1 100 Continue\r\n\r\n"]


def test_an_image_is_one_write_of_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[Recorder] = []

    def recorded(transport: asyncio.Transport, answer: Answer) -> HeadBuffer:
        recorders.append(Recorder(transport))
        return HeadBuffer(recorders[-1], answer)

    running = serve()
    monkeypatch.setattr(server.processes.uvicorn_server, "HeadBuffer", recorded)
    content = running.generate().content
    [one] = recorders
    [write] = one.writes
    assert write.startswith(b"HTTP/1.1 200 OK\r\n")
    assert write.endswith(b"\r\n\r\n" + content)


def test_a_client_may_wait_for_100_continue(plain: Running) -> None:
    body = b'{"prompt": "a red circle", "width": 64, "height": 64}'
    head = ("POST /generate HTTP/1.1", "content-type: application/json", f"content-length: {len(body)}")
    with Raw(plain.url) as raw:
        raw.send(*head, "expect: 100-continue")
        expected = b"HTTP/1.1 100 Continue\r\n\r\n"
        received = b""
        while len(received) < len(expected) and (part := raw.socket.recv(len(expected) - len(received))):
            received += part
        assert received == expected
        raw.socket.sendall(body)
        assert raw.read_response().status == 200
