"""The outermost middleware: every request passes it once on its way in and once on its way out.

In: request id, W3C trace context, Origin, API key and body limits. Out: headers, the error body, one metric and one log
line. Plain ASGI; it does not change the answer's body.
"""

import asyncio
import base64
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    EngineError,
    HttpError,
    RequestError,
    SlowBodyError,
)
from server.http import problem_details
from server.http.api_keys import ApiKeys
from server.http.state import RequestContext
from server.http.upload_limit import SMALL_BODY, content_length
from server.origins import Origins
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

# Need no key: what orchestrators and Prometheus poll, and the pages, which hold no data. A browser cannot send a header
# with the address of a page; the page asks its user for a key.
PUBLIC_PATHS = ("/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json")
PUBLIC_FOLDER = "/static/"
SDAPI_FOLDER = "/sdapi/"  # its clients support Basic alone
SCHEMA_PATH = "/openapi.json"  # FastAPI's own route, which is not in scope["route"]

PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing, and CORS protects their answers

KEY_SUBPROTOCOL = (
    "bearer."  # followed by base64url of an API key without padding: a page's websocket cannot set headers
)

DRAIN_S = 2.0  # longest wait for the rest of a small body that nobody reads

logger = logging.getLogger("server.http")


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest body in bytes, and longest time until it has arrived, in seconds."""

    body_bytes: int
    body_s: float


class RequestMiddleware:
    """ASGI middleware around everything else."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        keys: ApiKeys | None,
        origins: Origins,
        limits: BodyLimits,
        tracing: Tracing | None,
    ) -> None:
        self._app = app
        self._origins = origins
        self._tracing = tracing
        self._metrics = metrics
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope["path"] = normalised_path(scope["path"])
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        context = _context(headers)
        scope.setdefault("state", {})["context"] = context
        try:
            self._check_origin("websocket", headers)
            self._authorize(scope["path"], headers, _subprotocol_key(scope))
        except RequestError as error:
            answer = problem_details.response(error, path=scope["path"], request_id=context.request_id)
            await answer(scope, receive, send)
            fields = {"path": scope["path"], "status": error.status, "request_id": context.request_id}
            logger.info("websocket refused: %s", error.detail, extra={"fields": fields})
            return
        await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        context = _context(headers)
        scope.setdefault("state", {})["context"] = context
        exchange = _Exchange(headers, receive, send, context, self._limits, page=_is_page(scope["path"]))
        try:
            if scope["method"] not in SAFE_METHODS:
                self._check_origin("request", headers)
            self._authorize(scope["path"], headers)
            exchange.check_length()
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.status = exchange.status or ClientGoneError.status
            raise
        except RequestError as error:
            await self._answer(error, scope, exchange)
        except Exception as error:
            logger.error("%s %s failed", scope["method"], _route(scope), exc_info=error)
            detail = "the server failed on this request; the log says more under its request id"
            await self._answer(EngineError(detail), scope, exchange)
        finally:
            self._metrics.bookkeeping.later(partial(self._record, scope, exchange, time.monotonic()))

    def _check_origin(self, kind: str, headers: Headers) -> None:
        """Raises HttpError (403) for a page of another site: CORS hides only the answer from it."""
        origin, host = headers.get("origin"), headers.get("host")
        if self._origins.permits(origin, host):
            return
        self._metrics.origins_refused.labels(kind).inc()
        logger.warning("refused by its Origin: got %r, sent to Host %r; --cors-origins allows others", origin, host)
        raise HttpError(403, f"Origin: got {origin}, allowed: this server's own page, and --cors-origins")

    def _authorize(self, path: str, headers: Headers, subprotocol_key: str | None = None) -> None:
        if self._keys is not None and path not in PUBLIC_PATHS and not path.startswith(PUBLIC_FOLDER):
            basic = path.startswith(SDAPI_FOLDER)
            self._keys.check(headers.get("authorization", subprotocol_key), basic=basic)

    async def _answer(self, error: RequestError, scope: Scope, exchange: "_Exchange") -> None:
        if exchange.started:
            raise error  # too late for another answer: uvicorn resets the connection
        if isinstance(error, ClientGoneError):
            exchange.status = error.status
            return
        answer = problem_details.response(error, path=scope["path"], request_id=exchange.context.request_id)
        await answer(scope, exchange.receive, exchange.send)

    def _record(self, scope: Scope, exchange: "_Exchange", ended: float) -> None:
        route = _route(scope)
        seconds = ended - exchange.context.arrived
        self._metrics.requests.labels(route, exchange.status).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        trace_id = exchange.context.trace_id
        if self._tracing is not None:
            trace_id = self._tracing.record(
                method=scope["method"],
                route=route,
                status=exchange.status,
                request_id=exchange.context.request_id,
                seconds=seconds,
                ended_s_ago=time.monotonic() - ended,
                headers=Headers(scope=scope),
                timings=scope["state"].get("timings"),
            )
        if logger.isEnabledFor(logging.INFO):
            fields: dict[str, object] = {
                "method": scope["method"],
                "route": route,
                "status": exchange.status,
                "ms": round(seconds * 1000, 2),
                "request_id": exchange.context.request_id,
            }
            if trace_id is not None:
                fields["trace_id"] = trace_id
            logger.info("request", extra={"fields": fields})


class _Exchange:
    """ASGI receive and send of one request, with body limits and the headers of every answer."""

    def __init__(
        self,
        headers: Headers,
        receive: Receive,
        send: Send,
        context: RequestContext,
        limits: BodyLimits,
        *,
        page: bool,
    ) -> None:
        self.context = context
        self.status = 0
        self.started = False
        self._receive = receive
        self._send = send
        self._limits = limits
        self._page = page
        self._length = content_length(headers)
        self._unread = self._length != 0 and (self._length is not None or "transfer-encoding" in headers)
        self._read = 0

    def check_length(self) -> None:
        """Raises BodyTooLargeError (413) if Content-Length exceeds the limit."""
        if self._length is not None and self._length > self._limits.body_bytes:
            raise self._too_large(f"{self._length} bytes")

    async def receive(self) -> Message:
        if not self._unread:
            return await self._receive()
        remaining_s = self.context.arrived + self._limits.body_s - time.monotonic()
        try:
            async with asyncio.timeout(remaining_s):
                message = await self._receive()
        except TimeoutError as error:
            self._length = None  # no second wait for the rest of this body
            raise SlowBodyError(
                f"the body did not arrive within {self._limits.body_s:g} s; got {self._read} bytes"
            ) from error
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._unread = message.get("more_body", False)
            if self._read > self._limits.body_bytes:
                raise self._too_large(f"more than {self._limits.body_bytes} bytes")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._unread:
                await self._drain_body()
            self.started = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers()]
            await self._send(message)
        else:
            await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"x-request-id", self.context.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if self._unread:
            headers.append((b"connection", b"close"))
        if self._page:
            headers += [
                (b"content-security-policy", PAGE_POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"x-frame-options", b"DENY"),
            ]
        return headers

    async def _drain_body(self) -> None:
        """Reads the rest of a small body, so that the connection stays usable. With a larger one it closes."""
        if self._length is not None and self._length <= min(SMALL_BODY, self._limits.body_bytes):
            await _within(DRAIN_S, self._read_small())

    async def _read_small(self) -> None:
        read = 0
        while self._unread and read <= SMALL_BODY:
            message = await self._receive()
            read += len(message.get("body", b""))
            self._unread = message["type"] == "http.request" and message.get("more_body", False)

    def _too_large(self, received: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"body: got {received}, allowed: at most {self._limits.body_bytes} bytes")


async def _within(seconds: float, work: Awaitable[None]) -> None:
    """Awaits `work` for at most `seconds`, then cancels it silently."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


def _context(headers: Headers) -> RequestContext:
    received = headers.get("x-request-id", "")
    trace = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return RequestContext(
        request_id=received if REQUEST_ID.fullmatch(received) else secrets.token_hex(16),
        trace_id=trace.group(1) if trace else None,
        arrived=time.monotonic(),
    )


def _subprotocol_key(scope: Scope) -> str | None:
    """Returns the key that a page sends as a websocket subprotocol, as an Authorization header; None without one."""
    for name in scope["subprotocols"]:
        if name.startswith(KEY_SUBPROTOCOL):
            encoded = name.removeprefix(KEY_SUBPROTOCOL)
            with contextlib.suppress(ValueError):
                return "Bearer " + base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    return None


def normalised_path(path: str) -> str:
    """Removes doubled and trailing slashes from paths of other servers' APIs, as their clients send them."""
    single = re.sub("//+", "/", path)
    return single.rstrip("/") if single.startswith(("/v1/", SDAPI_FOLDER)) else path


def _is_page(path: str) -> bool:
    return path in ("/", "/docs") or path.startswith(PUBLIC_FOLDER)


def _route(scope: Scope) -> str:
    """Returns the path template of the route: a metric label with few values for any request."""
    path: str = scope["path"]
    if path == SCHEMA_PATH:
        return path
    if path.startswith(PUBLIC_FOLDER):
        return "/static"
    return getattr(scope.get("route"), "path", None) or "unmatched"
