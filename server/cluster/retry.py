"""Asks again where a replica died with a request inside. Runs in Ray Serve's proxies, outside of every replica.

A picture depends on its request alone, so that asking twice is as good as asking once; and a request whose replica died
has no answer yet. The server's own errors are answers and go through. Serve finds `middlewares` by the name in
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Plain ASGI.
"""

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "server.cluster.retry:middlewares"
PAUSES_S = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)  # before each further attempt: Serve notices a death within a second
KEPT_BYTES = 32 * 2**20  # of a body; a longer one is sent on as it comes, and asked for once
OURS = "x-content-type-options"  # server.http.middleware puts it on every answer

logger = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    return [Middleware(AskAgain)]


class AskAgain:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own routes
            await self._app(scope, receive, send)
            return
        request = _Request(receive)
        for pause_s in PAUSES_S:
            answer = _Answer(send)
            error = await self._ask(dict(scope), request, answer)
            if answer.given or request.lost:
                if error is not None:
                    raise error
                return
            logger.warning("no answer from a replica to %s %s; asking again", scope["method"], scope["path"])
            request.rewind()
            await asyncio.sleep(pause_s)
        await self._app(scope, request.receive, send)

    async def _ask(self, scope: Scope, request: "_Request", answer: "_Answer") -> Exception | None:
        try:
            await self._app(scope, request.receive, answer.send)
        except Exception as error:  # given back, and raised where this was the last word
            return error
        return None


class _Request:
    """What the client sent, kept so that it can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._kept = 0
        self._read = 0
        self.lost = False  # the client left, or its body is too long to be kept

    async def receive(self) -> Message:
        if self._read < len(self._messages):
            self._read += 1
            return self._messages[self._read - 1]
        message = await self._receive()
        if message["type"] != "http.request":
            self.lost = True
            return message
        self._kept += len(message.get("body", b""))
        if self._kept > KEPT_BYTES:
            self.lost = True
            self._messages.clear()
            self._read = 0
        if not self.lost:
            self._messages.append(message)
            self._read += 1
        return message

    def rewind(self) -> None:
        self._read = 0


class _Answer:
    """Passes an answer on, unless it is the proxy's own 500 or 503."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.given = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.given = message["status"] not in (500, 503) or OURS in Headers(raw=message.get("headers", []))
        if self.given:
            await self._send(message)
