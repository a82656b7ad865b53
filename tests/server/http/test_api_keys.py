"""API keys: file formats, public paths, reloading, bad files."""

import hashlib
import os
from pathlib import Path

import httpx
import pytest
from running_server import Running, Serve, wait_until

import server.http.api_keys
from server.errors import SettingsError, UnauthorizedError
from server.http.api_keys import ApiKeys
from server.http.middleware import PUBLIC_PATHS

HASHED = hashlib.sha256(b"hashed-key").hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# keys\n\n  plain-key \nsha256:{HASHED}\n")
    return path


@pytest.fixture
def keyed(serve: Serve, path: Path) -> Running:
    return serve(api_key_file=str(path))


def ask(running: Running, key: str) -> int:
    return running.client.post("/generate", json={}, headers={"authorization": f"Bearer {key}"}).status_code


def test_plain_and_hashed_keys_open(keyed: Running) -> None:
    assert [ask(keyed, key) for key in ("plain-key", "hashed-key")] == [422, 422]
    assert [ask(keyed, key) for key in ("plain-key2", "Plain-key", HASHED, f"sha256:{HASHED}", "# keys")] == [401] * 5


@pytest.mark.parametrize("header", ["plain-key", "Basic plain-key", "Bearer", "Bearer\tplain-key"])
def test_only_bearer_opens(keyed: Running, header: str) -> None:
    assert keyed.client.post("/generate", json={}, headers={"authorization": header}).status_code == 401


def test_open_paths_are_the_listed_ones(keyed: Running) -> None:
    schema = keyed.client.get("/openapi.json", headers={"authorization": "Bearer plain-key"}).json()
    paths = {*schema["paths"], "/", "/docs", "/openapi.json", "/nothing", "/v1/live"}
    open_ones = {path for path in paths if keyed.client.get(path).status_code != 401}
    assert (
        open_ones
        == set(PUBLIC_PATHS)
        == {*("/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json")}
    )


def test_a_websocket_without_a_key_is_refused_before_it_opens(keyed: Running) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert keyed.client.get("/v1/live", headers=upgrade).status_code in (401, 403)


def test_the_file_is_read_again_when_it_changes(
    keyed: Running, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.http.api_keys, "CHECK_EVERY_S", 0.0)
    path.write_text("new-key\n")
    wait_until(lambda: ask(keyed, "new-key") == 422)
    assert ask(keyed, "plain-key") == 401
    path.write_text("\n")
    os.utime(path, ns=(1, 1))
    assert ask(keyed, "new-key") == 422  # a broken file locks nobody out
    path.unlink()
    assert ask(keyed, "new-key") == 422
    assert "keeping the API keys read before" in caplog.text
    assert "new-key" not in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no key"),
        (b"# only\n\n", "holds no key"),
        (b"ok\nsha256:12\n", "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_bad_file_stops_the_start(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        ApiKeys(path)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        ApiKeys(tmp_path / "none")


def test_every_known_key_is_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ApiKeys(path)
    compared: list[bytes] = []

    def compare(_: bytes, known: bytes) -> bool:
        compared.append(known)
        return True

    monkeypatch.setattr(server.http.api_keys.hmac, "compare_digest", compare)
    keys.check("Bearer x")
    assert len(compared) == 2  # compares all, although the first one matched
    monkeypatch.undo()
    with pytest.raises(UnauthorizedError):
        keys.check(None)


def test_answers_do_not_repeat_keys(keyed: Running) -> None:
    answer: httpx.Response = keyed.client.post("/generate", headers={"authorization": "Bearer my-wrong-key"})
    assert "my-wrong-key" not in answer.text
