"""Origin checks: pages of this server and of allowed sites generate images, others get 403 with the reason."""

import json
import logging
from typing import Any

import numpy as np
import pytest
from raw_client import Raw
from running_server import Running, Serve, image_file

from server.errors import SettingsError
from server.settings import load_settings

EVIL = "https://evil.example"
BODY = {"prompt": "a red circle", "width": 64, "height": 64}
UPGRADE = ("connection: upgrade", "upgrade: websocket")
KEY = ("sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==")


def posted(running: Running, path: str, **headers: str) -> int:
    if path == "/v1/images/edits":
        image = image_file(np.zeros((64, 64, 3), dtype=np.uint8))
        form: dict[str, Any] = {"files": {"image": image}, "data": {"prompt": "x", "n": "8", "size": "64x64"}}
        return running.client.post(path, headers=headers, **form).status_code
    return running.client.post(path, json=BODY, headers=headers).status_code


PATHS = ["/generate", "/v1/images/generations", "/v1/images/edits"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1:1", "https://x", "", "nonsense", "file://"])
def test_a_page_of_another_site_makes_nothing(plain: Running, path: str, origin: str) -> None:
    before = plain.metric("sana_sprint_origins_refused_total", kind="request")
    assert posted(plain, path, origin=origin) == 403
    assert plain.metric("sana_sprint_origins_refused_total", kind="request") == before + 1


def test_a_refusal_keeps_the_connection_and_says_what_is_allowed(plain: Running) -> None:
    answer = plain.client.post("/generate", json=BODY, headers={"origin": EVIL})
    assert answer.status_code == 403
    assert EVIL in answer.json()["detail"]
    assert "--cors-origins" in answer.json()["detail"]
    assert plain.client.post("/v1/images/generations", json=BODY, headers={"origin": EVIL}).json()["error"]["code"]


def test_forms_that_need_no_preflight_are_refused_on_any_path(plain: Running) -> None:
    headers = {"origin": EVIL, "content-type": "text/plain"}
    for path in ("/generate", "/v1/models", "/nothing", "/"):
        assert plain.client.post(path, content=json.dumps(BODY), headers=headers).status_code == 403


@pytest.mark.parametrize("path", PATHS)
def test_own_pages_and_programs_may(plain: Running, path: str) -> None:
    assert posted(plain, path) == 200
    assert posted(plain, path, origin=plain.url) == 200
    assert posted(plain, path, origin=plain.url.upper()) == 200


@pytest.mark.parametrize("path", PATHS)
def test_allowed_pages_may(serve: Serve, path: str) -> None:
    running = serve(cors_origins=("http://localhost:5173", "tauri://localhost"))
    assert posted(running, path, origin="http://localhost:5173") == 200
    assert posted(running, path, origin="tauri://localhost") == 200
    assert posted(running, path, origin="http://localhost:5174") == 403
    assert posted(serve(cors_origins=("*",)), path, origin=EVIL) == 200


OWN = [
    ("draw.example.org:443", "https://draw.example.org"),
    ("draw.example.org", "https://draw.example.org:443"),
    ("draw.example.org:80", "http://draw.example.org"),
    ("Draw.Example.ORG", "https://draw.example.org"),
    ("draw.example.org", "HTTPS://DRAW.example.org"),
    ("draw.example.org:8443", "https://draw.example.org:8443"),
    ("[::1]:8000", "http://[::1]:8000"),
    ("[::1]", "http://[::1]:80"),
]
OTHERS = [
    ("draw.example.org:8443", "https://draw.example.org"),
    ("draw.example.org", "https://draw.example.org.evil.example"),
    ("draw.example.org", "https://evil.example/draw.example.org"),
    ("draw.example.org", "https://draw.example.org@evil.example"),
    ("draw.example.org:80", "https://draw.example.org"),
    ("127.0.0.1", EVIL),
]


@pytest.mark.parametrize(
    ("host", "origin", "own"), [*((*pair, True) for pair in OWN), *((*pair, False) for pair in OTHERS)]
)
def test_a_page_is_known_by_the_host_it_came_from(
    plain: Running, host: str, origin: str, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = plain.metric("sana_sprint_origins_refused_total", kind="websocket")
    headers = (f"origin: {origin}", f"host: {host}")
    with caplog.at_level(logging.WARNING, "server.http"), Raw(plain.url) as raw:
        head = "\r\n".join(["GET /v1/live HTTP/1.1", *UPGRADE, *KEY, *headers, "", ""])
        raw.socket.sendall(head.encode())
        assert raw.read_response("GET").status == (101 if own else 403)
    lines = [record.getMessage() for record in caplog.records if record.name == "server.http"]
    assert len(lines) == (0 if own else 1)
    assert all(origin in line and host in line for line in lines)
    assert plain.metric("sana_sprint_origins_refused_total", kind="websocket") == before + (not own)


def test_x_forwarded_host_is_not_trusted(plain: Running) -> None:
    assert posted(plain, "/generate", origin=EVIL, **{"x-forwarded-host": "evil.example"}) == 403


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "tauri://localhost", "app://obsidian.md", "https://a.example"]
)
@pytest.mark.parametrize("network", [False, True])
def test_the_preflight_of_an_allowed_page_passes(serve: Serve, origin: str, network: bool) -> None:
    text = "http://LOCALHOST:5173, tauri://localhost,app://obsidian.md/,https://a.example:443/"
    settings = load_settings(["--cors-origins", text], {})
    running = serve(cors_origins=settings.cors_origins)
    preflight = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
    if network:
        preflight["access-control-request-private-network"] = "true"
    answer = running.client.options("/v1/images/generations", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert set(STAINLESS.split(",")) <= allowed
    answer = running.client.post("/generate", json=BODY, headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    assert running.client.options("/generate", headers=preflight | {"origin": EVIL}).status_code == 400


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("https://a.example/", "https://a.example"),
        ("HTTPS://A.Example:443", "https://a.example"),
        ("http://localhost:5173", "http://localhost:5173"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("http://[::1]:3000/", "http://[::1]:3000"),
        ("*", "*"),
    ],
)
def test_origins_are_taken_as_people_write_them(text: str, normalised: str) -> None:
    assert load_settings(["--cors-origins", text], {}).cors_origins == (normalised,)


@pytest.mark.parametrize(
    "text",
    [
        *("https://a.example/app", "https://a.example//", "a.example", "https://", "://x", "https://a.example?x"),
        *("https://u@a.example", "https://a.example:99999", "https://a.example:x", "null", "https://*.example"),
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"allowed: origins such as"):
        load_settings(["--cors-origins", text], {})
