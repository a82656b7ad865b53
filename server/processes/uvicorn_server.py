"""uvicorn with drain on SIGTERM, limits on the size and time of request heads, and a write timeout.

Knows sockets and signals, but no images.
"""

import asyncio
import json
import logging
import math
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.http.disconnect import STATE, Disconnect
from server.http.problem_details import MEDIA_TYPE
from server.http.state import AppState
from server.live.messages import MAX_DRAWING
from server.live.sessions import LiveSessions
from server.processes.accepting import Acceptor, listen
from server.processes.announce import print_listening, print_ready, server_url
from server.processes.garbage import resume_collector
from server.processes.head_buffer import HeadBuffer
from server.processes.lingering import LingeringTransport
from server.processes.upgrades import announces_body, offers_websocket, without_offer
from server.settings import Settings

HEAD_BYTES = 64 * 1024  # request line and headers, plus at most one read from the socket
HEAD_S = 30.0  # from the connection, or a head's first byte, to the head's end
HANDSHAKE_S = 30.0  # from the end of a websocket's head to its answer
WRITE_STALL_MS = 60_000  # a client that acknowledges no data for so long loses its connection
LIVE_SEND_BYTES = 128 * 1024  # kernel send buffer of each websocket
KEEP_ALIVE_S = 75  # longer than the 60 s of load balancers, so that they close idle connections first

logger = logging.getLogger("server.processes")


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with the limits that it leaves to a proxy."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_open = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._disconnect = Disconnect()  # of the newest request
        self._offered = False  # this request offers another protocol: the parser stops after its head

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(LingeringTransport(transport))
        listening = transport.get_extra_info("socket")
        if listening is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, WRITE_STALL_MS)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)
        self._disconnect.happen()

    def data_received(self, data: bytes) -> None:
        if self._head_open:
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, f"the head of a request may hold {HEAD_BYTES} bytes")
                return
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)

    def _parse(self, data: bytes | memoryview) -> None:
        """Parses as uvicorn's data_received, which drops all data after an offer of another protocol."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                data = memoryview(data)[stop.args[0] :]
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            if self._takes_websocket():
                if announces_body(self.headers):
                    self._refuse(400, "the handshake of a websocket has no body, and this one announces one")
                else:
                    self.handle_websocket_upgrade()
                return
            if self.scope["method"] == "CONNECT":  # has no body, and the data after it is not HTTP
                self._refuse(405, "this is no proxy: CONNECT is not taken", "allow: GET, HEAD, POST\r\n")
                return
            head = without_offer(self.scope["method"], self.url, self.scope["http_version"], self.headers)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
            self._offered = False
            try:
                self.parser.feed_data(head)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return

    def _takes_websocket(self) -> bool:
        """Returns whether a websocket may take the connection: not while an earlier request waits for its answer."""
        free = self.cycle is None or self.cycle.response_complete
        return free and offers_websocket(self.scope["method"], self.scope["http_version"], self.headers)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._offered = False
        if not self._head_open:
            self._begin_head()

    def handle_websocket_upgrade(self) -> None:
        # Images that wait in the kernel for a slow reader are outdated once it reads them: keep few.
        listening = self.transport.get_extra_info("socket")
        if listening is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIVE_SEND_BYTES)
        super().handle_websocket_upgrade()

    def on_headers_complete(self) -> None:
        self._end_head()
        self._offered = self.parser.should_upgrade()
        if self._offered:  # _parse decides, with the parser stopped
            self.scope["method"] = self.parser.get_method().decode("ascii")
            self.scope["http_version"] = self.parser.get_http_version()
        else:
            self._disconnect = self.scope["state"][STATE] = Disconnect()
            super().on_headers_complete()
            self.cycle.transport = HeadBuffer(self.transport, self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self._offered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offered:
            super().on_message_complete()

    def shutdown(self) -> None:
        _shut(self.transport, super().shutdown)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"{msg} This is not HTTP/1.1.")

    def _begin_head(self) -> None:
        self._head_open = True
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._head_late)

    def _end_head(self) -> None:
        self._head_open = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._refuse(408, f"the head of the request did not arrive within {HEAD_S:g} s")

    def _refuse(self, status: int, detail: str, header: str = "") -> None:
        self._end_head()
        refuse(self.transport, status, detail, header)


def refuse(transport: asyncio.Transport, status: int, detail: str, header: str = "") -> None:
    """Answers data that never became a request, and closes. `header` is one more line of the head."""
    if transport.is_closing():
        return
    phrase = HTTPStatus(status).phrase
    body = json.dumps({"title": phrase, "status": status, "detail": detail}).encode()
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n{header}"
    transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
    transport.close()


def _shut(transport: asyncio.Transport, gently: Callable[[], None]) -> None:
    """Ends a connection without waiting for its client; logs an error instead of raising it."""
    try:
        gently()
        if isinstance(transport, LingeringTransport) and transport.is_closing():
            transport.close_now()
    except Exception as error:
        logger.warning("a connection was reset: %r", error)
        transport.abort()


class LimitedWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's websocket protocol with limits.

    Text that is not UTF-8 ends the connection (1007) without a traceback. A handshake that is none gets 400 at once,
    and any other an answer within HANDSHAKE_S.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(HANDSHAKE_S, self._handshake_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception as error:  # caused by this client's data
            logger.warning("a websocket was reset: %r", error)
            self.transport.abort()
            return
        if not self.handshake_initiated:  # the parser got the whole head and found no handshake in it
            refuse(self.transport, 400, "this is no handshake of a websocket (RFC 6455)")

    def shutdown(self) -> None:
        _shut(self.transport, super().shutdown)

    def _handshake_late(self) -> None:
        if not self.handshake_complete and self.initial_response is None:
            refuse(self.transport, 503, f"the handshake was not answered within {HANDSHAKE_S:g} s; try again")
            self.disconnected = True

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                if self.conn.state.name == "OPEN":  # else it is closing already
                    self.conn.send_close(1007, "text must be UTF-8")
                    self.handle_parser_exception()
                return
        super().send_receive_event_to_app()


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on the first SIGTERM or SIGINT.

    It goes on listening, answers 503 to new requests, and stops once all accepted requests are answered. A second
    signal stops it at once.
    """

    def __init__(
        self, config: uvicorn.Config, service: AppState, live: LiveSessions, listeners: Sequence[socket.socket] = ()
    ) -> None:
        super().__init__(config)
        self._service = service
        self._live = live
        self._listeners = listeners
        self._acceptor = Acceptor(listeners, self._on_connection)
        self._tasks: list[asyncio.Task[None]] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's signature
        await super().startup(sockets=[])
        self._acceptor.resume()
        self._tasks.append(asyncio.create_task(self._end_start(), name="end of the start"))
        if self._listeners:
            url = server_url(self.config.host, self._listeners[0].getsockname()[1])
            self._tasks.append(asyncio.create_task(self._announce(url), name="announce"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._acceptor.close()
        await super().shutdown(sockets)

    def _on_connection(self, connection: socket.socket) -> None:
        task = asyncio.create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            instance: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )
            return instance

        try:
            await loop.connect_accepted_socket(protocol, connection)
        except OSError:  # the client has left
            connection.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        scheduler = self._service.scheduler
        if scheduler.loop is None or scheduler.state == "draining":
            super().handle_exit(sig, frame)
        else:
            scheduler.begin_drain()
            scheduler.loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain(), name="drain"))

    async def _drain(self) -> None:
        settings = self._service.settings
        logger.info("draining: at most %g s", settings.shutdown_timeout_s)
        await asyncio.sleep(settings.drain_delay_s)
        scheduler = self._service.scheduler
        self._live.drain()
        await scheduler.drain()
        # Only slow readers still wait for the rest of their answers.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(scheduler.drain_left_s))
        self.should_exit = True

    async def _announce(self, url: str) -> None:
        print_listening(url, self._service.settings.model)
        await self._service.scheduler.ready.wait()
        print_ready(url)

    async def _end_start(self) -> None:
        await self._service.scheduler.ready.wait()
        resume_collector()


def serve(app: FastAPI, settings: Settings) -> None:
    """Listens until a signal, then drains. Blocks. Raises ListenError before anything is loaded."""
    listeners = listen(settings.host, settings.port)
    DrainingServer(uvicorn_config(app, settings), app.state.service, app.state.live, listeners).run()


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedHttpProtocol,
        ws=LimitedWebSocketProtocol,
        ws_max_size=MAX_DRAWING,
        ws_per_message_deflate=False,  # images and drawings are compressed already
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, math.ceil(settings.shutdown_timeout_s)),
    )
