"""Every row of the contract's table of statuses, over real HTTP."""

import http.client
import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from running_server import GatedEngine, Running, Serve, wait_until

from engines.fake import FakeEngine
from engines.types import Engine


def is_problem(answer: httpx.Response, status: int, code: str, path: str = "/generate") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["title"] == (http.HTTPStatus(status).phrase)
    assert body["instance"] == path
    assert body["code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]
    assert len(body["detail"]) > 10
    assert ("errors" in body) == (status == 422)
    return body


def is_openai_error(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == code


def connect(running: Running) -> socket.socket:
    parts = urlsplit(running.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def head(path: str = "/generate", **headers: Any) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: test", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def test_401_with_a_missing_or_a_wrong_key(serve: Serve, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    running = serve(api_key_file=str(keys))
    answers = [running.generate(), running.client.post("/generate", headers={"authorization": "Bearer wrong"})]
    for answer in answers:
        is_problem(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    is_openai_error(running.client.post("/v1/images/generations", json={}), 401, "invalid_api_key")
    running.client.headers["authorization"] = "Bearer right"
    assert running.generate().status_code == 200


def test_404_and_405(plain: Running) -> None:
    is_problem(plain.client.get("/nothing"), 404, "not_found", "/nothing")
    is_problem(plain.client.get("/generate/"), 404, "not_found", "/generate/")
    answer = plain.client.get("/generate")
    is_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    is_openai_error(plain.client.get("/v1/nothing"), 404, "not_found")
    is_openai_error(plain.client.get("/v1/images/generations"), 405, "method_not_allowed")


def test_408_for_a_body_that_does_not_come(serve: Serve) -> None:
    running = serve(body_timeout_s=0.05)
    with connect(running) as connection:
        connection.sendall(head(content_length=100) + b'{"prompt"')
        status, headers, body = answer_of(connection)
    assert (status, json.loads(body)["code"]) == (408, "body_timeout")
    assert headers["connection"] == "close"


def test_413_by_the_announced_length_before_any_of_the_body(serve: Serve) -> None:
    running = serve(body_limit_mib=0.01)
    with connect(running) as connection:
        connection.sendall(head(content_length=20_000))
        status, headers, body = answer_of(connection)
    assert (status, json.loads(body)["code"]) == (413, "body_too_large")
    assert headers["connection"] == "close"


def test_413_while_a_body_of_unknown_length_streams(serve: Serve) -> None:
    running = serve(body_limit_mib=0.01)
    with connect(running) as connection:
        connection.sendall(head(transfer_encoding="chunked"))
        for _ in range(11):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        status, _, body = answer_of(connection)  # before the end of the body
    assert (status, json.loads(body)["code"]) == (413, "body_too_large")


def test_413_reaches_a_client_that_sends_everything_first(serve: Serve) -> None:
    running = serve(body_limit_mib=0.01)
    with connect(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # the kernel cannot buffer all of it
        connection.sendall(head(content_length=3_000_000) + b" " * 3_000_000)
        status, _, _ = answer_of(connection)
    assert status == 413
    is_problem(running.generate("x" * 3_000_000), 413, "body_too_large")
    assert running.generate().status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_415(plain: Running, headers: dict[str, str]) -> None:
    answer = plain.client.post("/generate", content=b'{"prompt": "x"}', headers=headers)
    is_problem(answer, 415, "unsupported_media_type")


def test_415_for_an_edit_that_is_neither_form_nor_json(plain: Running) -> None:
    answer = plain.client.post("/v1/images/edits", content=b"{}", headers={"content-type": "text/plain"})
    is_openai_error(answer, 415, "unsupported_media_type")


def test_422_names_field_value_and_what_is_allowed(plain: Running) -> None:
    body = is_problem(plain.generate(guidance_scale=11), 422, "invalid_value")
    assert body["errors"] == [
        {
            "field": "guidance_scale",
            "pointer": "#/guidance_scale",
            "detail": "guidance_scale: got 11, allowed: a number from 1 to 10",
        }
    ]


def test_429_at_once_with_the_time_to_come_back(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1, max_queue=2)
    first = running.submit_generate()
    gated.wait_for_batch()
    waiting = [running.submit_generate(), running.submit_generate()]
    running.wait_for_queued(2)
    answer = running.generate()
    is_problem(answer, 429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    is_openai_error(running.client.post("/v1/images/generations", json={"prompt": "x"}), 429, "queue_full")
    gated.gate.set()
    assert [one.result().status_code for one in (first, *waiting)] == [200, 200, 200]
    assert running.metric("sana_sprint_jobs_dropped_total", reason="queue_full") == 2


def test_429_for_a_large_body_comes_before_it_is_read(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1, max_queue=1)
    accepted = [running.submit_generate()]
    gated.wait_for_batch()
    accepted.append(running.submit_generate())
    running.wait_for_queued(1)
    with connect(running) as connection:
        connection.sendall(head(content_length=1_000_000))
        status, headers, _ = answer_of(connection)
    assert (status, headers["connection"]) == (429, "close")
    gated.gate.set()
    assert [one.result().status_code for one in accepted] == [200, 200]


def test_499_is_logged_and_its_job_does_not_run(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1)
    first = running.submit_generate("first")
    gated.wait_for_batch()
    body = json.dumps({"prompt": "left", "num_images": 3, "width": 64, "height": 64}).encode()
    with connect(running) as connection:
        connection.sendall(head(content_length=len(body)) + body)
        running.wait_for_queued(3)
    running.wait_for_queued(0)
    gated.gate.set()
    assert first.result().status_code == 200
    assert [job.prompt for batch in gated.seen for job in batch] == ["first"]
    assert running.metric("sana_sprint_jobs_dropped_total", reason="client_gone") == 3
    assert running.metric("sana_sprint_requests_total", route="/generate", status="499") == 1


def test_499_while_the_body_is_being_sent(serve: Serve) -> None:
    running = serve()
    with connect(running) as connection:
        connection.sendall(head(content_length=100) + b'{"prompt"')
    wait_until(lambda: running.metric("sana_sprint_requests_total", route="/generate", status="499") == 1)


def test_500_when_the_engine_fails_on_a_job(plain: Running) -> None:
    is_problem(plain.generate("a [[raise]] b"), 500, "engine_failed")
    is_problem(plain.generate("a [[nan]] b"), 500, "engine_failed")
    is_problem(plain.generate("a [[black]] b"), 500, "engine_failed")
    assert plain.generate().status_code == 200
    assert plain.metric("sana_sprint_engine_failures_total", kind="error") == 2  # each was retried once
    assert plain.metric("sana_sprint_engine_failures_total", kind="output") == 4


def test_503_until_the_engine_is_warm(serve: Serve) -> None:
    loading = threading.Event()

    def load() -> Engine:
        assert loading.wait(30)
        return FakeEngine()

    running = serve(load, ready=False)
    try:
        assert running.client.get("/health/live").json() == {"status": "live"}
        answers = {path: running.client.get(path) for path in ("/health/ready", "/v1/info")}
        for path, answer in [*answers.items(), ("/generate", running.generate())]:
            is_problem(answer, 503, "not_ready", path)
            assert int(answer.headers["retry-after"]) >= 1
        is_openai_error(running.client.get("/v1/models"), 503, "not_ready")
    finally:
        loading.set()
    wait_until(lambda: running.client.get("/health/ready").status_code == 200)
    assert running.generate().status_code == 200


def test_503_while_draining_and_what_was_accepted_is_answered(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1)
    accepted = [running.submit_generate()]
    gated.wait_for_batch()
    accepted += [running.submit_generate() for _ in range(3)]
    running.wait_for_queued(3)
    running.service.scheduler.begin_drain()
    is_problem(running.generate(), 503, "draining")
    is_problem(running.client.get("/health/ready"), 503, "draining", "/health/ready")
    assert running.client.get("/health/live").status_code == 200
    gated.gate.set()
    assert [one.result().status_code for one in accepted] == [200] * 4
    assert running.metric("sana_sprint_jobs_dropped_total", reason="draining") == 1


def test_504_promptly_and_the_job_is_never_run(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1)
    first = running.submit_generate("first")
    gated.wait_for_batch()
    is_problem(running.generate("late", timeout_ms=30, num_images=2), 504, "deadline_exceeded")  # the gate is shut
    is_openai_error(
        running.client.post("/v1/images/generations", json={"prompt": "late", "timeout_ms": 30}),
        504,
        "deadline_exceeded",
    )
    assert running.waiting == 0
    gated.gate.set()
    assert first.result().status_code == 200
    assert [job.prompt for batch in gated.seen for job in batch] == ["first"]
    assert running.metric("sana_sprint_jobs_dropped_total", reason="deadline") == 3


def test_504_by_the_servers_own_limit(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1, timeout_ms=30)
    first = running.submit_generate("first", timeout_ms=1000)  # it starts within this time on a busy machine as well
    gated.wait_for_batch()
    time.sleep(1.0)  # its deadline has passed, but it began before
    is_problem(running.generate(), 504, "deadline_exceeded")
    gated.gate.set()
    assert first.result().status_code == 200
