"""What the routes share, made once for each app and kept in `app.state.service`."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from server.generation.generator import Generator
from server.generation.image_codec import Codec
from server.generation.scheduler import Scheduler
from server.http.upload_limit import Uploads
from server.settings import Settings
from server.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the routes know of the exchange, as `request.state.context`."""

    request_id: str
    trace_id: str | None
    arrived: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class AppState:
    settings: Settings
    metrics: Metrics
    scheduler: Scheduler
    codec: Codec
    generator: Generator
    uploads: Uploads
    expose: Callable[[Metrics], Awaitable[bytes]]  # what GET /metrics answers


def app_state(connection: HTTPConnection) -> AppState:
    """The service of the app that a request or a websocket came to."""
    service: AppState = connection.app.state.service
    return service


def request_context(connection: HTTPConnection) -> RequestContext:
    """Request id, trace id and time of arrival, as the edge noted them."""
    context: RequestContext = connection.state.context
    return context
