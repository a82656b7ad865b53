"""Settings and keys as people and hosts write them: byte order marks, Kubernetes links, empty variables."""

import codecs
import json
import shutil
from pathlib import Path

import pytest
from program import Server
from running_server import Running, Serve

from engines.checkpoints.weights import FolderWeights, read_json
from server.errors import EXIT_SETTINGS, SettingsError
from server.settings import Settings, load_settings

TINY = Path(__file__).resolve().parents[2] / "models/tiny"
HASH = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of foo


def admitted(running: Running, key: str) -> bool:
    answer = running.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize(
    ("first", "key"), [("foo", "foo"), (HASH, "foo"), ("# ours\r\nfoo", "foo"), ("\r\n foo \r\n", "foo")]
)
def test_keys_with_a_byte_order_mark_are_keys(
    serve: Serve, tmp_path: Path, encoding: str, first: str, key: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"{first}\r\nsecond\r\n".encode(encoding))
    running = serve(api_key_file=str(path))
    assert admitted(running, key)
    assert admitted(running, "second")
    assert not admitted(running, "# ours")
    assert not admitted(running, HASH)


def test_files_of_keys_that_were_put_together_have_marks_in_between(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(codecs.BOM_UTF8 + b"one\n" + codecs.BOM_UTF8 + b"two\n" + codecs.BOM_UTF8 + b"# three\n")
    running = serve(api_key_file=str(path))
    assert [admitted(running, key) for key in ("one", "two", "# three")] == [True, True, False]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_checkpoints_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(json.dumps({"a": "ä"}, ensure_ascii=False).encode(encoding))
    assert read_json(path) == {"a": "ä"}


def test_a_checkpoint_edited_on_windows_opens(tmp_path: Path) -> None:
    from engines.checkpoints.checkpoint import open_checkpoint

    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    edited = [path for path in folder.rglob("*.json") if path.parent.name != "controlnet"]
    for path in edited:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(edited) > 5
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint.weights, FolderWeights)
    assert (
        checkpoint.load_tokenizer().encode("a red circle").ids
        == open_checkpoint("tiny").load_tokenizer().encode("a red circle").ids
    )


LINKS = [
    ("SPRINT_SERVICE_HOST", "10.0.0.1", "sprint"),
    ("SPRINT_SERVICE_PORT", "80", "sprint"),
    ("SPRINT_SERVICE_PORT_HTTP", "80", "sprint"),
    ("SPRINT_PORT", "tcp://10.0.0.1:80", "sprint"),
    ("SPRINT_PORT", "udp://10.0.0.1:80", "sprint"),
    ("SPRINT_PORT_80_TCP", "tcp://10.0.0.1:80", "sprint"),
    ("SPRINT_PORT_80_TCP_ADDR", "10.0.0.1", "sprint"),
    ("SPRINT_PORT_80_TCP_PORT", "80", "sprint"),
    ("SPRINT_PORT_80_TCP_PROTO", "tcp", "sprint"),
    ("SPRINT_MODEL_SERVICE_HOST", "10.0.0.1", "sprint-model"),
    ("SPRINT_OTLP_PORT", "tcp://10.0.0.1:4317", "sprint-otlp"),
    ("SPRINT_MAX_QUEUE_PORT_6379_TCP", "tcp://10.0.0.1:6379", "sprint-max-queue"),
]


@pytest.mark.parametrize(("variable", "value", "service"), LINKS)
def test_a_service_link_is_told_apart_from_a_setting(variable: str, value: str, service: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings([], {variable: value})
    for word in (variable, value, "Kubernetes", f"Service {service!r}", "enableServiceLinks: false"):
        assert word in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_port_is_still_a_port() -> None:
    assert load_settings([], {"SPRINT_PORT": "8001"}).port == 8001
    with pytest.raises(SettingsError, match="0 to 65535"):
        load_settings([], {"SPRINT_PORT": "http"})


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert (
        load_settings([], {"SPRINT_PORT": "", "SPRINT_MODEL": "", "SPRINT_MAX_QUEUE": "", "SPRINT_NO_SETTING": ""})
        == Settings()
    )
    with pytest.raises(SettingsError, match="--max-queue"):
        load_settings(["--max-queue", ""], {})


def test_a_pod_beside_a_service_is_told_why_it_does_not_start() -> None:
    server = Server("--backend", "fake", **{variable: value for variable, value, _ in LINKS[:9]})
    assert server.wait_end() == EXIT_SETTINGS
    assert "enableServiceLinks: false" in server.output


def test_the_manifests_turn_links_off() -> None:
    yaml = pytest.importorskip("yaml")
    text = (TINY.parents[1] / "deploy/kubernetes/rayservice.yaml").read_text()
    config = yaml.safe_load(text)["spec"]["rayClusterConfig"]
    groups = [config["headGroupSpec"], *config["workerGroupSpecs"]]
    assert [group["template"]["spec"]["enableServiceLinks"] for group in groups] == [False, False]
