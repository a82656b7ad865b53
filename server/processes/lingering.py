"""Closes connections so that the client receives the last answer, whatever it still sends (RFC 9112, 9.6).

A system that closes a socket with unread bytes resets the connection, and the client's system then drops the answer.
"""

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_S = 2.0
LINGER_BYTES = 4 * 2**20


class LingeringTransport(asyncio.Transport):
    """A socket's transport whose `close` ends its own direction, and reads on until the client has ended the other.

    Reads at most LINGER_BYTES within LINGER_S, and drops them.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._lingers = False

    def close(self) -> None:
        if self.is_closing():
            return
        transport, protocol = self._transport, self._transport.get_protocol()
        self._lingers = True
        try:
            transport.write_eof()
        except OSError:  # the client has left
            transport.abort()
            return
        timer = asyncio.get_running_loop().call_later(LINGER_S, transport.close)
        transport.set_protocol(_Dropping(protocol, transport.close, timer))
        transport.resume_reading()

    def close_now(self) -> None:
        """Closes without waiting for the client."""
        self._transport.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._lingers:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        if not self._lingers:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class _Dropping(asyncio.Protocol):
    """Drops what the client still sends. The protocol before it learns of the end and of room for writing."""

    def __init__(self, protocol: asyncio.BaseProtocol, close: Callable[[], None], timer: asyncio.TimerHandle) -> None:
        self._protocol, self._close, self._timer = protocol, close, timer
        self._dropped = 0
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def data_received(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._dropped > LINGER_BYTES:
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._protocol.connection_lost(exc)
