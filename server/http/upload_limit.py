"""Limits the memory of large bodies until their requests hold slots in the queue."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.requests import Request

from server.errors import QueueFullError

SMALL_BODY = 64 * 1024  # bytes; a smaller unread body is read before an early answer, which keeps the connection alive


def content_length(headers: Headers) -> int | None:
    """Returns Content-Length, or None without a valid one. Cuts after 18 digits, which exceed every limit anyway."""
    value = headers.get("content-length", "")
    return int(value[:18]) if value.isascii() and value.isdigit() else None


class UploadLimit:
    """Limits how many large bodies are read and parsed at the same time."""

    def __init__(self, max_bodies: int) -> None:
        self._free = max_bodies

    @contextmanager
    def hold(self, request: Request) -> Iterator[None]:
        """Holds a slot while a large body is read and parsed. Raises QueueFullError (429) without a free slot."""
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
