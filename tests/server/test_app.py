"""The app around the routes: info, page, schema, headers, logs, CORS."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, Serve, wait_until
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Receive, Scope, Send

from engines.fake import FakeEngine
from server import __version__
from server.http.routes.openai_schemas import ImagesResponse
from server.http.routes.openapi import GENERATION_ERRORS
from server.http.routes.schemas import GenerateAnswer, Problem
from server.telemetry.logs import JsonFormatter, TextFormatter

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_distributions() -> None:
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_info_tells_what_runs_and_what_it_can(serve: Serve) -> None:
    running = serve(FakeEngine(max_batch=4, sizes=((64, 64), (96, 64)), default_size=(64, 64)), max_batch=2)
    body = running.client.get("/v1/info").json()
    assert {name: body[name] for name in ("checkpoint", "backend", "precision", "device", "manifest")} == {
        "checkpoint": "fake",
        "backend": "fake",
        "precision": "uint8",
        "device": "none",
        "manifest": None,
    }
    assert (body["sizes"], body["default_size"], body["steps"]) == ([[64, 64], [96, 64]], [64, 64], [1, 2, 3, 4])
    assert (body["max_batch"], body["max_queue"]) == (2, 128)
    assert body["versions"]["sana-sprint-server"] == __version__
    assert body["reasons"]["backend"]


@pytest.mark.parametrize(
    ("method", "path", "status", "routed"),
    [
        ("POST", "/generate", 200, False),
        ("GET", "/health/live", 200, False),
        ("HEAD", "/health/live", 200, True),  # no method of the route, which answers it all the same
        ("GET", "/generate", 405, True),
        ("GET", "/v1/models/fake", 200, True),  # the path has a parameter
        ("GET", "/nothing", 404, True),
    ],
)
def test_fastapis_router_is_asked_only_for_what_no_fixed_path_answers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int, routed: bool
) -> None:
    asked: list[str] = []
    around_router = ExceptionMiddleware.__call__

    async def ask(self: ExceptionMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope.get("path", "lifespan"))
        await around_router(self, scope, receive, send)

    monkeypatch.setattr(ExceptionMiddleware, "__call__", ask)
    running = serve(FakeEngine())
    asked.clear()
    body = {"prompt": "a red circle", "width": 64, "height": 64}
    answer = running.client.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == status
    assert asked == [path] * routed


def test_the_page_is_served_with_its_policy(plain: Running) -> None:
    answer = plain.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"
    assert "default-src 'self'" in plain.client.get("/docs").headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/docs", "/metrics", "/nothing", "/health/live"])
def test_every_answer_has_an_id_and_may_not_be_sniffed(plain: Running, path: str) -> None:
    headers = plain.client.get(path).headers
    assert len(headers["x-request-id"]) == 32
    assert headers["x-content-type-options"] == "nosniff"


def test_a_clients_request_id_is_kept_if_it_is_harmless(plain: Running) -> None:
    def echoed(request_id: str) -> str:
        return plain.client.get("/health/live", headers={"x-request-id": request_id}).headers["x-request-id"]

    assert echoed("abc-123_x.Y") == "abc-123_x.Y"
    for harmful in ("", "a b", "x" * 129, "a\tb", 'a"b'):
        assert echoed(harmful) != harmful


def test_no_path_of_a_client_leaves_the_static_folder(plain: Running) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"):
        assert plain.client.get(path).status_code == 404


def test_cors_is_off_unless_asked_for(serve: Serve) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed, opened = serve(), serve(cors_origins=("https://a.example",))
    assert "access-control-allow-origin" not in closed.client.options("/generate", headers=preflight).headers
    answer = opened.client.options("/generate", headers=preflight)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = opened.client.options("/generate", headers=preflight | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_logs_carry_ids_and_never_a_prompt(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    running = serve()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"x-request-id": "my-id", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    for prompt in ("a secret word", "a secret word [[raise]]", "", "a secret word" * 500):
        running.client.post(
            "/generate",
            json={"prompt": prompt, "colour": "secret"} if not prompt else {"prompt": prompt},
            headers=headers,
        )

    def logged() -> list[dict[str, Any]]:
        records = [record for record in caplog.records if record.name == "server.http" and hasattr(record, "fields")]
        return [record.fields for record in records if record.fields["request_id"] == "my-id"]

    wait_until(lambda: len(logged()) == 4)
    mine = logged()
    assert [fields["status"] for fields in mine] == [200, 500, 422, 422]
    assert all(fields["trace_id"] == trace for fields in mine)
    for formatter in (JsonFormatter(), TextFormatter()):
        assert not any(
            "secret" in formatter.format(record) for record in caplog.records if record.name.startswith("server")
        )


def test_a_json_log_line_is_one_object() -> None:
    record = logging.LogRecord("server", logging.INFO, "x.py", 1, "two\nlines %s", ("é",), None)
    record.fields = {"status": 200}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines é"
    assert json.loads(line)["status"] == 200


def test_the_schema_has_every_route_and_its_errors(plain: Running) -> None:
    schema = plain.client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        *("/generate", "/health/live", "/health/ready", "/metrics", "/v1/info"),
        *("/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/models/{name}"),
    }
    for path in ("/generate", "/v1/images/generations", "/v1/images/edits"):
        responses = schema["paths"][path]["post"]["responses"]
        unknown_model = {"404"} if path.startswith("/v1/") else set()
        assert set(responses) == {"200", *map(str, GENERATION_ERRORS)} | unknown_model, path
        media_types = set(responses["422"]["content"])
        assert media_types == {"application/problem+json" if path == "/generate" else "application/json"}
    (name,) = schema["paths"]["/v1/models/{name}"]["get"]["parameters"]
    assert (name["name"], name["in"], name["required"]) == ("name", "path", True)
    unresolved = [name for name in references(schema) if name not in schema["components"]["schemas"]]
    assert unresolved == []


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"].removeprefix("#/components/schemas/")] if "$ref" in node else []
        return own + [name for value in node.values() for name in references(value)]
    return [name for value in node for name in references(value)] if isinstance(node, list) else []


def test_the_schemas_examples_work(plain: Running) -> None:
    schema = plain.client.get("/openapi.json").json()
    for path in ("/generate", "/v1/images/generations"):
        examples = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            assert plain.client.post(path, json=example["value"]).status_code == 200


def test_answers_are_what_the_schema_says(plain: Running) -> None:
    GenerateAnswer.model_validate(plain.generate(num_images=2).json(), extra="forbid")
    answer = plain.client.post("/v1/images/generations", json={"prompt": "x"})
    ImagesResponse.model_validate(answer.json(), extra="forbid")
    Problem.model_validate(plain.generate(seed=-1).json(), extra="forbid")


def test_the_docs_are_served(plain: Running) -> None:
    assert "swagger" in plain.client.get("/docs").text
