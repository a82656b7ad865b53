"""Retries a request whose replica died. Runs in Ray Serve's proxies, outside of every replica.

An image depends on its request alone, so requests are idempotent. The server's own errors are answers and are not
retried. Serve finds `middlewares` by the name in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Plain ASGI.
"""

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "server.cluster.retry:middlewares"
RETRY_DELAYS_S = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)  # before each further attempt: Serve notices a death within a second
MAX_BUFFERED_BYTES = 32 * 2**20  # a longer body is streamed and not retried
OWN_HEADER = "x-content-type-options"  # server.http.middleware adds it to every answer

logger = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    return [Middleware(RetryMiddleware)]


class RetryMiddleware:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # routes of the proxy itself
            await self._app(scope, receive, send)
            return
        request = _Request(receive)
        for delay_s in RETRY_DELAYS_S:
            answer = _Answer(send)
            error = await self._attempt(dict(scope), request, answer)
            if answer.forwarded or not request.replayable:
                if error is not None:
                    raise error
                return
            logger.warning("no answer from a replica to %s %s; asking again", scope["method"], scope["path"])
            request.rewind()
            await asyncio.sleep(delay_s)
        await self._app(scope, request.receive, send)

    async def _attempt(self, scope: Scope, request: "_Request", answer: "_Answer") -> Exception | None:
        try:
            await self._app(scope, request.receive, answer.send)
        except Exception as error:  # returned; the caller raises it after the last attempt
            return error
        return None


class _Request:
    """ASGI receive with a buffer, so that a later attempt can read the request again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._buffered = 0
        self._read = 0
        self.replayable = True  # False: the client left, or its body exceeds the buffer

    async def receive(self) -> Message:
        if self._read < len(self._messages):
            self._read += 1
            return self._messages[self._read - 1]
        message = await self._receive()
        if message["type"] != "http.request":
            self.replayable = False
            return message
        self._buffered += len(message.get("body", b""))
        if self._buffered > MAX_BUFFERED_BYTES:
            self.replayable = False
            self._messages.clear()
            self._read = 0
        if self.replayable:
            self._messages.append(message)
            self._read += 1
        return message

    def rewind(self) -> None:
        self._read = 0


class _Answer:
    """Forwards an answer, unless it is the proxy's own 500 or 503."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.forwarded = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.forwarded = message["status"] not in (500, 503) or OWN_HEADER in Headers(
                raw=message.get("headers", [])
            )
        if self.forwarded:
            await self._send(message)
