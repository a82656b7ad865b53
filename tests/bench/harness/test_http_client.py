"""The load generator's connections: used again while the server surely keeps them; responses are read whole or not."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import pytest

from bench.harness.errors import BenchError
from bench.harness.http_client import MAX_IDLE_S, ByteStream, Connection, ConnectionPool
from server.processes.uvicorn_server import KEEP_ALIVE_S


@pytest.mark.parametrize(("max_idle_s", "connections"), [(60.0, 1), (0.0, 3)])
def test_a_connection_that_idled_too_long_is_not_used_again(max_idle_s: float, connections: int) -> None:
    opened = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def exchange() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            pool = ConnectionPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", max_idle_s)
            for _ in range(3):
                assert (await pool.exchange("GET", "/")).body == b"ok"
            await pool.close()
            for writer in opened:
                writer.close()

    asyncio.run(exchange())
    assert len(opened) == connections


def test_the_client_gives_up_a_connection_before_the_server_does() -> None:
    assert MAX_IDLE_S < KEEP_ALIVE_S


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: "
Result = TypeVar("Result")
Sends = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def reading(sends: Sends, reads: Callable[[ByteStream], Awaitable[Result]]) -> Result:
    """Returns what `reads` makes of a connection to a server that runs `sends` once and closes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await sends(writer)
        except ConnectionError:
            pass  # the client has enough
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        stream = await ByteStream.connect("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            return await reads(stream)
        finally:
            stream.abort()
            server.close()
            await asyncio.sleep(0.01)


def responses(sent: Sequence[bytes], count: int) -> list[bytes]:
    """Returns the bodies of `count` responses of a server that sends these pieces and closes."""

    async def sends(writer: asyncio.StreamWriter) -> None:
        for piece in sent:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)  # mostly a separate TCP segment

    async def reads(stream: ByteStream) -> list[bytes]:
        connection = Connection(stream, "x")
        return [(await connection.read_response()).body for _ in range(count)]

    return asyncio.run(reading(sends, reads))


@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
def test_a_response_is_read_whole_however_it_is_cut(size: int) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    message = HEAD + f"{size}\r\n\r\n".encode() + body
    assert responses([message, message], 2) == [body] * 2
    assert responses([message + message], 2) == [body] * 2
    cuts = [0, 3, message.index(b"\r\n\r\n") + 2, len(message) - size // 2, len(message)]
    assert responses([message[first:last] for first, last in pairwise(cuts)], 1) == [body]


@pytest.mark.parametrize("sent", [HEAD + b"9\r\n\r\nok", HEAD])
def test_a_response_that_ends_early_is_no_response(sent: bytes) -> None:
    with pytest.raises(EOFError):
        responses([sent], 1)


def test_a_head_without_end_is_no_response() -> None:
    with pytest.raises(BenchError, match="head is longer than 65536"):
        responses([b"x" * 300_000], 1)


def test_what_nobody_reads_does_not_fill_memory() -> None:
    sent = 0

    async def sends(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < 256 * 2**20:
            writer.write(bytes(2**20))
            await writer.drain()
            sent += 2**20

    async def reads(stream: ByteStream) -> None:
        before = -1
        while before < sent:  # until it takes no more
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 64 * 2**20
        await stream.read(128 * 2**20)  # goes on

    asyncio.run(reading(sends, reads))
