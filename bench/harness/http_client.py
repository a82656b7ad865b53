"""A lean HTTP/1.1 client on asyncio, so that its own cost stays small beside the server's.

Supports keep-alive and answers with a Content-Length; no redirects, TLS or retries. A missing answer is an error, never
a second request.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from bench.harness.errors import BenchError

MAX_HEAD_BYTES = 64 * 1024
MAX_IDLE_S = 60.0  # less than the server's 75: a request on a connection that it closes just then is lost


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """Header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """A connection that carries one exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader, self._writer, self._host = reader, writer, host
        self._closes = False
        self._used = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last response."""
        return time.monotonic() - self._used

    @property
    def reusable(self) -> bool:
        return not (self._closes or self._reader.at_eof() or self._writer.is_closing())

    async def exchange(
        self, method: str, path: str, body: bytes = b"", media_type: str = "application/json"
    ) -> HttpResponse:
        """Sends a request and reads the whole response.

        Raises OSError or EOFError if the connection ends first, BenchError if the response is not HTTP/1.1.
        """
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n"
        content_type = f"content-type: {media_type}\r\n" if body else ""
        self._closes = True  # until the answer is read whole, nothing else may be sent here
        self._writer.write(f"{head}{content_type}\r\n".encode() + body)
        return await self.read_response()

    async def read_response(self) -> HttpResponse:
        """Reads the response to bytes already sent. Raises as `exchange` does."""
        status, headers = _parse_head(await self._reader.readuntil(b"\r\n\r\n"))
        content = await self._reader.readexactly(int(headers["content-length"]))
        self._closes = headers.get("connection", "").lower() == "close"
        self._used = time.monotonic()
        return HttpResponse(status, headers, content)

    async def close(self) -> None:
        """Closes at once and discards unsent and unread bytes."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


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
        reader, writer = await asyncio.open_connection(*self._address, limit=MAX_HEAD_BYTES)
        return Connection(reader, writer, self._host)


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    status_words = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if len(status_words) < 2 or not status_words[0].startswith("HTTP/1.") or not status_words[1].isdecimal():
        raise BenchError(f"answer: got {first!r}, needed is an HTTP/1.1 status line")
    if not headers.get("content-length", "").isdecimal():
        raise BenchError(f"answer: {first!r} without a Content-Length, which this client needs")
    return int(status_words[1]), headers
