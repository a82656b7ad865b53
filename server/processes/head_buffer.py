"""Sends the head of an answer together with a short body: one system call, and one wake-up of the client.

uvicorn writes head and body apart. On a busy host, the client that the head wakes takes this core before the body
leaves (bench/LOG.md).
"""

import asyncio
from typing import Protocol

JOINED_BYTES = 256 * 1024  # a longer body is sent after the head: copying it would take longer than a system call


class Answer(Protocol):
    """The part of uvicorn's RequestResponseCycle that tells of an answer."""

    response_started: bool


class HeadBuffer(asyncio.Transport):
    """The transport of one answer. Holds its head until the body, or until the next turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, answer: Answer) -> None:
        super().__init__()
        self._transport = transport
        self._answer = answer
        self._head = b""
        self._has_head = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._head and len(data) <= JOINED_BYTES:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif self._has_head or not self._answer.response_started:  # before the answer comes 100 Continue
            self._flush()
            self._transport.write(data)
        else:
            self._head, self._has_head = bytes(data), True
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)
