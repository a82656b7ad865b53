"""OpenTelemetry traces, as a collector receives them over HTTP."""

import gzip
import importlib.abc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_server import start

from engines.fake import FakeEngine
from server.app import create_app
from server.errors import SettingsError
from server.settings import Settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["queue", "text", "denoise", "decode", "encode"]


@dataclass
class Collector:
    """A collector that stores the bodies of POST /v1/traces."""

    url: str
    spans: list[Any] = field(default_factory=list)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def test_a_request_and_its_stages_join_the_callers_trace(collector: Collector) -> None:
    with ExitStack() as stack:
        running = start(stack, FakeEngine(delay_s=0.02), otlp_endpoint=collector.url + "/")
        body = {"prompt": "a secret", "width": 64, "height": 64}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "x-request-id": "mine"}
        assert running.client.post("/generate", json=body, headers=headers).status_code == 200
        assert running.client.post("/v1/images/generations", json=body | {"n": 2}).status_code == 200
        assert running.generate("[[raise]]").status_code == 500
    (mine,) = (span for span in collector.named("POST /generate") if span.trace_id.hex() == TRACE)
    assert mine.parent_span_id.hex() == PARENT
    assert mine.trace_state == "a=b"
    shown = {one.key: one.value for one in mine.attributes}
    assert shown["http.response.status_code"].int_value == 200
    assert shown["sana_sprint.request_id"].string_value == "mine"
    stages = [span for span in collector.spans if span.parent_span_id == mine.span_id]
    stages.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in stages] == STAGES
    for before, after in pairwise(stages):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert stages[-1].end_time_unix_nano == mine.end_time_unix_nano
    assert stages[3].end_time_unix_nano - stages[1].start_time_unix_nano >= 20_000_000  # the engine's delay
    assert len(collector.named("POST /v1/images/generations")) == 1
    failed = [span.status.code for span in collector.named("POST /generate") if span.trace_id.hex() != TRACE]
    assert failed == [2]
    assert not collector.named("GET /health/ready")
    assert not collector.named("GET /metrics")
    assert "secret" not in str(collector.spans)


def test_a_caller_who_does_not_sample_is_not_sampled(collector: Collector) -> None:
    with ExitStack() as stack:
        running = start(stack, FakeEngine(), otlp_endpoint=collector.url)
        running.client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-00"
        assert running.generate().status_code == 200
    assert collector.spans == []


def test_the_log_names_the_trace_that_was_begun(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "server.http")
    with ExitStack() as stack:
        assert start(stack, FakeEngine(), otlp_endpoint=collector.url).generate().status_code == 200
    logged = [getattr(record, "fields", {}) for record in caplog.records]
    (line,) = (fields for fields in logged if fields.get("route") == "/generate")
    (span,) = collector.named("POST /generate")
    assert line["trace_id"] == span.trace_id.hex()


def test_without_the_extra_the_start_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("opentelemetry.exporter"):
                raise ImportError(name)

    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SettingsError, match=r"needs the extra otel: pip install sana-sprint-server\[otel\]"):
        create_app(FakeEngine(), Settings(otlp_endpoint="http://127.0.0.1:1"))


def test_nothing_is_loaded_unless_asked_for() -> None:
    program = (
        "import sys, server.app, server.settings, engines.fake\n"
        "server.app.create_app(engines.fake.FakeEngine(), server.settings.Settings())\n"
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
