"""The route of WS /v1/live."""

from fastapi import APIRouter
from starlette.websockets import WebSocket

from server.http.state import request_context
from server.live.sessions import LiveSessions

router = APIRouter()


@router.websocket("/v1/live")
async def live_drawing(socket: WebSocket) -> None:
    """Generates images of drawings while the client draws: docs/use/live.md."""
    sessions: LiveSessions = socket.app.state.live
    await sessions.serve(socket, request_context(socket))
