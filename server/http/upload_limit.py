"""A bound on the memory that large bodies take before their requests hold slots in the queue."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.requests import Request

from server.errors import QueueFullError

SMALL_BODY = 64 * 1024  # an unread body of at most this is read before an early answer, so that the connection can stay


def content_length(headers: Headers) -> int | None:
    """What the head announces; None where it does not. More than 18 digits are cut: too much is too much."""
    value = headers.get("content-length", "")
    return int(value[:18]) if value.isascii() and value.isdigit() else None


class Uploads:
    """Bounds how many large bodies are in memory, on their way to becoming jobs, at the same time."""

    def __init__(self, most: int) -> None:
        self._free = most

    @contextmanager
    def one(self, request: Request) -> Iterator[None]:
        """Holds a place while a body is read and taken apart; small ones need none. Raises QueueFullError (429)."""
        length = content_length(request.headers)
        if length is not None and length <= SMALL_BODY:
            yield
            return
        if not self._free:
            raise QueueFullError("too many large bodies are being read; try again after Retry-After seconds", 1)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
