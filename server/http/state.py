"""Objects that the routes share, one set per app, in `app.state.service`; and the context of one request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection, Request

from server.generation.generator import GenerationResult, Generator
from server.generation.image_codec import Codec
from server.generation.scheduler import Scheduler
from server.http.upload_limit import UploadLimit
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.timings import server_timing


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Ids and arrival time of one request, in `request.state.context`."""

    request_id: str
    trace_id: str | None
    arrived: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class AppState:
    """Objects that every route of one app uses."""

    settings: Settings
    metrics: Metrics
    scheduler: Scheduler
    codec: Codec
    generator: Generator
    upload_limit: UploadLimit
    render_metrics: Callable[[Metrics], Awaitable[bytes]]  # the body of GET /metrics


def app_state(connection: HTTPConnection) -> AppState:
    """Returns the AppState of the app that received a request or a websocket."""
    state: AppState = connection.app.state.service
    return state


def request_context(connection: HTTPConnection) -> RequestContext:
    """Returns request id, trace id and arrival time, as RequestMiddleware stored them."""
    context: RequestContext = connection.state.context
    return context


def result_headers(request: Request, result: GenerationResult) -> dict[str, str]:
    """Returns the headers of an answer with `result`; stores its timings for the trace."""
    request.state.timings = result.timings_ms
    truncated = {"x-prompt-truncated": "true"} if result.prompt_truncated else {}
    return {"server-timing": server_timing(result.timings_ms), **truncated}
