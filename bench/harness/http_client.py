"""A lean HTTP/1.1 client on asyncio, so that its own cost stays small beside the server's.

Supports keep-alive and answers with a Content-Length; no redirects, TLS or retries. A missing answer is an error, never
a second request.
"""

import asyncio
import socket
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from bench.harness.errors import BenchError

HEAD_END = b"\r\n\r\n"
FIRST_BYTES = 4096  # of a buffer, which grows to the longest answer
MAX_HEAD_BYTES = 64 * 1024
MAX_IDLE_S = 60.0  # less than the server's 75: a request on a connection that it closes just then is lost


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """Header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class ByteStream(asyncio.BufferedProtocol):
    """A TCP connection that wakes its reader once all the bytes that it waits for are in one buffer.

    asyncio's StreamReader wakes it for each piece: 0.5 ms for an image of 0.9 MB (bench/LOG.md).
    """

    def __init__(self) -> None:
        self._buffer = bytearray(FIRST_BYTES)
        self._filled = 0
        self._wanted = 0
        self._waiter: asyncio.Future[None] | None = None
        self._end: Exception | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, host: str, port: int) -> Self:
        """Raises OSError."""
        return (await asyncio.get_running_loop().create_connection(cls, host, port))[1]

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        return (await asyncio.get_running_loop().create_connection(cls, sock=connected))[1]

    @property
    def ended(self) -> bool:
        return self._end is not None or self._transport is None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Closes at once and discards unsent and unread bytes."""
        if self._transport is not None:
            self._transport.abort()

    async def read_head(self) -> bytes:
        """Reads to an empty line, included. Raises OSError or EOFError if the connection ends first, BenchError."""
        searched = 0
        while (end := self._buffer.find(HEAD_END, searched, self._filled)) < 0:
            if self._filled > MAX_HEAD_BYTES:
                raise BenchError(f"answer: its head is longer than {MAX_HEAD_BYTES} bytes")
            searched = max(0, self._filled - len(HEAD_END) + 1)
            await self._wait(self._filled + 1)
        return self._take(end + len(HEAD_END))

    async def read(self, count: int) -> bytes:
        """Reads `count` bytes. Raises OSError or EOFError if the connection ends first."""
        if count > len(self._buffer):
            self._grow(count)
        await self._wait(count)
        return self._take(count)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        if self._filled == len(self._buffer):
            self._grow(2 * self._filled)
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._waiter is not None and self._filled >= self._wanted:
            self._wake()
        elif self._waiter is None and self._filled > MAX_HEAD_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._end = EOFError("the connection ended")
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end = exc or self._end or EOFError("the connection ended")
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, count: int) -> None:
        while self._filled < count:
            if self._end is not None:
                raise self._end
            if self._transport is not None:
                self._transport.resume_reading()
            self._wanted, self._waiter = count, asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self, count: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:count])
            view[: self._filled - count] = view[count : self._filled]
        self._filled -= count
        return taken

    def _grow(self, size: int) -> None:
        larger = bytearray(size)  # the old one cannot be resized while the transport holds it
        larger[: self._filled] = self._buffer[: self._filled]
        self._buffer = larger


class Connection:
    """A connection that carries one exchange at a time."""

    def __init__(self, stream: ByteStream, host: str) -> None:
        self._stream, self._host = stream, host
        self._closes = False
        self._used = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last response."""
        return time.monotonic() - self._used

    @property
    def reusable(self) -> bool:
        return not (self._closes or self._stream.ended)

    async def exchange(
        self, method: str, path: str, body: bytes = b"", media_type: str = "application/json"
    ) -> HttpResponse:
        """Sends a request and reads the whole response.

        Raises OSError or EOFError if the connection ends first, BenchError if the response is not HTTP/1.1.
        """
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n"
        content_type = f"content-type: {media_type}\r\n" if body else ""
        self._closes = True  # until the answer is read whole, nothing else may be sent here
        self._stream.write(f"{head}{content_type}\r\n".encode() + body)
        return await self.read_response()

    async def read_response(self) -> HttpResponse:
        """Reads the response to bytes already sent. Raises as `exchange` does."""
        status, headers = _parse_head(await self._stream.read_head())
        content = await self._stream.read(int(headers["content-length"]))
        self._closes = headers.get("connection", "").lower() == "close"
        self._used = time.monotonic()
        return HttpResponse(status, headers, content)

    async def close(self) -> None:
        """Closes at once and discards unsent and unread bytes."""
        self._stream.abort()
        await asyncio.sleep(0)  # until the socket is closed


class ConnectionPool:
    """Reuses the most recently used connection that has idled for less than `max_idle_s`; opens others on demand."""

    def __init__(self, url: str, max_idle_s: float = MAX_IDLE_S) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise BenchError(f"url: got {url!r}, needed is http://host:port")
        self._address = (parts.hostname, parts.port or 80)
        self._host = parts.netloc
        self._max_idle_s = max_idle_s
        self._idle: list[Connection] = []

    async def exchange(
        self, method: str, path: str, body: bytes = b"", media_type: str = "application/json"
    ) -> HttpResponse:
        """Exchanges on an idle or new connection; see Connection.exchange."""
        connection = await self._connection()
        try:
            response = await connection.exchange(method, path, body, media_type)
        except BaseException:
            await connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            await connection.close()
        return response

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_s < self._max_idle_s:
                return connection
            await connection.close()
        return Connection(await ByteStream.connect(*self._address), self._host)


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    status_words = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if len(status_words) < 2 or not status_words[0].startswith("HTTP/1.") or not status_words[1].isdecimal():
        raise BenchError(f"answer: got {first!r}, needed is an HTTP/1.1 status line")
    if not headers.get("content-length", "").isdecimal():
        raise BenchError(f"answer: {first!r} without a Content-Length, which this client needs")
    return int(status_words[1]), headers
