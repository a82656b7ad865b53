"""Malformed requests: every answer is an image or an error with a reason, never a failure of the server."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import Running

from server.http.routes.openai_schemas import ImageGenerationRequest
from server.http.routes.schemas import GenerateRequest

FIELDS = sorted({*GenerateRequest.model_fields, *ImageGenerationRequest.model_fields, "unknown"})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["png", "webp", "64x64", "auto", "b64_json", "url", 64, 96, "data:,", "AAAA"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6).map(
    lambda body: {"prompt": "x", "width": 64, "height": 64} | body
)
headers = st.dictionaries(
    st.sampled_from(
        ["accept", "content-type", "x-request-id", "traceparent", "authorization", "content-encoding", "range"]
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40).map(str.strip).filter(len),
    max_size=3,
)
usual = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(running: Running, path: str, content: bytes, given_headers: dict[str, str]) -> int:
    answer = running.client.post(path, content=content, headers={"content-type": "application/json"} | given_headers)
    assert answer.status_code in (200, 415, 422, 504), (answer.status_code, answer.text[:500])
    if answer.status_code != 200:
        body: dict[str, Any] = answer.json()
        assert body["error"]["message"] if "error" in body else body["detail"]
    return answer.status_code


@usual
@given(st.sampled_from(["/generate", "/v1/images/generations"]), bodies, headers)
def test_any_fields(plain: Running, path: str, body: dict[str, Any], given_headers: dict[str, str]) -> None:
    check(plain, path, json.dumps(body).encode(), given_headers)


def is_an_object(content: bytes) -> bool:
    """Hypothesis also draws constants of the code, so some requests are valid."""
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


@usual
@given(st.sampled_from(["/generate", "/v1/images/generations", "/v1/images/edits"]), st.binary(max_size=200))
def test_any_bytes(plain: Running, path: str, content: bytes) -> None:
    kind = "multipart/form-data; boundary=x" if path.endswith("edits") else "application/json"
    accepted = check(plain, path, content, {"content-type": kind}) == 200
    assert not accepted or (kind == "application/json" and is_an_object(content))


@usual
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["image", "image[]", "mask", "prompt", "n", "size", "other"]),
            st.sampled_from(["", "; filename=x.png", "; filename="]),
            st.binary(max_size=30),
        ),
        max_size=6,
    )
)
def test_any_form(plain: Running, parts: list[tuple[str, str, bytes]]) -> None:
    content = b"".join(
        f'--x\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
        for name, file, value in parts
    )
    check(plain, "/v1/images/edits", content + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"})


def test_the_server_is_as_before(plain: Running) -> None:
    """Runs last: the tests above leave no job, slot or failure behind."""
    assert plain.generate().status_code == 200
    assert plain.service.scheduler._queue.in_flight == 0
    assert plain.metric("sana_sprint_engine_failures_total", kind="error") == 0
