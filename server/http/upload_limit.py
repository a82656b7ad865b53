"""A bound on the memory that large bodies take before their requests hold slots in the queue."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from server.errors import QueueFullError
from server.http.middleware import SMALL_BODY, content_length


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
