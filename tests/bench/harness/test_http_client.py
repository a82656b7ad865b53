"""The load generator's connections: used again while the server surely keeps them, and not later."""

import asyncio

import pytest

from bench.harness.http_client import MAX_IDLE_S, ConnectionPool
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
