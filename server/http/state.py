"""What the routes share, made once for each app and kept in `app.state.service`."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from server.generation.generator import Generation
from server.generation.image_codec import Codec
from server.generation.scheduler import Batcher
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
class Service:
    settings: Settings
    metrics: Metrics
    batcher: Batcher
    codec: Codec
    generation: Generation
    uploads: Uploads
    expose: Callable[[Metrics], Awaitable[bytes]]  # what GET /metrics answers


def service_of(connection: HTTPConnection) -> Service:
    """The service of the app that a request or a websocket came to."""
    service: Service = connection.app.state.service
    return service


def context_of(connection: HTTPConnection) -> RequestContext:
    """Request id, trace id and time of arrival, as the edge noted them."""
    context: RequestContext = connection.state.context
    return context
