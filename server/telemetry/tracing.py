"""OpenTelemetry traces: one span per request, with one child span per stage. Needs --otlp-endpoint.

The module loads the SDK only with --otlp-endpoint. It creates spans after the answer, from times that the server
measures anyway, so tracing adds no latency. The stage spans end at the answer, one after the other: queue, text,
denoise, decode, encode. A span joins the caller's trace (W3C traceparent, tracestate) and keeps its sampling decision.
Attributes never hold a prompt, a seed or a key.
"""

import time
from collections.abc import Mapping

from server import __version__
from server.errors import SettingsError
from server.telemetry.timings import Timings

POLLED = ("/health/live", "/health/ready", "/metrics")  # polled every few seconds; not traced


class Tracing:
    """Sends spans to a collector in batches, from a thread of the SDK. `endpoint` is its base URL, without /v1/traces.

    Raises SettingsError without the extra `otel`.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(
                "--otlp-endpoint: needs the extra otel: pip install sana-sprint-server[otel]"
            ) from error
        resource = Resource.create({"service.name": "sana-sprint-server", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    def record(
        self,
        *,
        method: str,
        route: str,
        status: int,
        request_id: str,
        seconds: float,
        ended_s_ago: float,
        headers: Mapping[str, str],
        timings: Timings | None,
    ) -> str | None:
        """Records a request that took `seconds`. Returns its trace id (32 hex digits); None if POLLED."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if route in POLLED:
            return None
        end = time.time_ns() - int(ended_s_ago * 1e9)
        tracer = self._provider.get_tracer("sana-sprint-server", __version__)
        span = tracer.start_span(
            f"{method} {route}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=end - int(seconds * 1e9),
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "sana_sprint.request_id": request_id,
            },
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        parent, until = set_span_in_context(span), end
        for stage, ms in reversed(timings._asdict().items() if timings else ()):
            if stage not in ("total", "safety"):  # checks run before the queue, or within encode
                begun = until - int(ms * 1e6)
                tracer.start_span(stage, context=parent, start_time=begun).end(until)
                until = begun
        span.end(end)
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Sends the remaining spans. Blocks for a few seconds at most."""
        self._provider.shutdown()
