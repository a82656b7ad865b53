"""All sessions of WS /v1/live: admission, limit and end. docs/use/live.md describes the protocol.

Each session has at most one job in the server's one queue, oldest first. So sessions take turns, and share batches with
each other and with plain requests.
"""

import asyncio
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from server.errors import (
    CLOSE_BUSY,
    CLOSE_ENGINE,
    CLOSE_RESTART,
    SessionEndError,
    UnavailableError,
)
from server.generation.generator import Generator
from server.generation.scheduler import Scheduler
from server.http.state import RequestContext
from server.live.messages import SUBPROTOCOL, message
from server.live.session import LiveSession
from server.settings import Settings
from server.telemetry.metrics import Metrics

GOODBYE_S = 2.0  # to send the reason of an end to a client that may not read

logger = logging.getLogger("server.live")


class LiveSessions:
    """All sessions of this server."""

    def __init__(self, scheduler: Scheduler, generator: Generator, metrics: Metrics, settings: Settings) -> None:
        self._scheduler = scheduler
        self._generator = generator
        self._metrics = metrics
        self._settings = settings
        self._sessions: set[LiveSession] = set()
        metrics.live_sessions.set_function(lambda: len(self._sessions))

    async def serve(self, socket: WebSocket, context: RequestContext) -> None:
        """Serves one connection from its handshake to its end."""
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        images_sent, reason = 0, "client"
        try:
            session = self._admit(socket)
            self._sessions.add(session)
            try:
                await session.run()
            finally:
                self._sessions.discard(session)
                images_sent = session.images_sent
        except WebSocketDisconnect:
            pass  # the client left while something was sent to it
        except SessionEndError as error:
            reason = error.code
            await _close(socket, error)
        except Exception as error:
            reason = "failed"
            logger.error("a live session failed", exc_info=error)
            await _close(socket, SessionEndError(reason, "the server failed; its log says more", CLOSE_ENGINE))
        self._metrics.live_ended.labels(reason).inc()
        fields = {"reason": reason, "images": images_sent, "request_id": context.request_id}
        logger.info("live session ended", extra={"fields": fields})

    def drain(self) -> None:
        """Ends every session, because the server shuts down."""
        for session in self._sessions:
            session.end(SessionEndError("draining", "the server is shutting down; connect again", CLOSE_RESTART))

    def _admit(self, socket: WebSocket) -> LiveSession:
        """Raises SessionEndError without a free session or an engine."""
        try:
            self._scheduler.check_ready()
        except UnavailableError as error:
            raise SessionEndError(error.code, error.detail, CLOSE_BUSY) from error
        most = self._settings.live_sessions
        if len(self._sessions) >= most:
            raise SessionEndError("too_many_sessions", f"{most} people are drawing; try again soon", CLOSE_BUSY)
        return LiveSession(
            socket,
            self._scheduler,
            self._generator,
            self._metrics,
            timeout_ms=self._settings.timeout_ms,
            idle_s=self._settings.live_idle_s,
        )


async def _close(socket: WebSocket, error: SessionEndError) -> None:
    """Sends the reason and closes, if the client is still connected."""
    if socket.application_state != WebSocketState.CONNECTED or socket.client_state != WebSocketState.CONNECTED:
        return
    try:
        async with asyncio.timeout(GOODBYE_S):
            await socket.send_text(message("end", {"code": error.code, "detail": error.detail}))
            await socket.close(error.close_code, error.detail)
    except (WebSocketDisconnect, TimeoutError, RuntimeError):  # the last is uvicorn's for a connection closed meanwhile
        logger.debug("the client did not receive why its session ended: %s", error.code)
