"""Downloads by huggingface_hub from a local hub: faults of the network, and the messages."""

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, Hub, files_of, serving_hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from program import Program
from running_server import wait_until

from engines.checkpoints import hub_download
from engines.checkpoints.hub import SHORT_NAMES, find_folder
from engines.errors import CheckpointError

CODE = """
import logging, sys
from engines.checkpoints.hub import SHORT_NAMES, find_folder
from engines.errors import CheckpointError
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.getLogger("httpx2").setLevel(logging.WARNING)
try:
    print("folder", find_folder(sys.argv[1]))
except CheckpointError as error:
    print("refused", error)
"""
TRANSFORMER, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))


class Downloading(Program):
    exit_timeout_s = 60.0

    def __init__(self, hub: Hub, home: Path, model: str = "org/model", command: tuple[str, ...] = (), **more: str):
        self.command = command
        super().__init__("-W", "error", "-c", CODE, model, **hub.environment(home, **more))

    def result(self) -> str:
        """Returns the output of the program; fails on a traceback."""
        assert self.wait_end() == 0, self.output
        return self.output


def answer(said: str, kind: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith((kind, "folder ", "refused "))]
    assert line.startswith(f"{kind} "), said
    return line.partition(" ")[2]


FILES = {
    "model_index.json": b"{}",
    "README.md": b"not read",
    "vae/config.json": b"{}" * 50,
    "tokenizer/tokenizer.json": b"[1]",
    **{
        f"{part}/diffusion_pytorch_model.safetensors": bytes(range(7, 207)) * n
        for part, n in (("transformer", 200), ("vae", 150))
    },
    "text_encoder/model.safetensors": b"text" * 9000,
}
Fetch = Callable[..., str]
READ = {name: content for name, content in FILES.items() if name != "README.md"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_download, "RETRY_PAUSE_S", 0.01)
    with serving_hub(dict(FILES)) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def assert_whole(folder: str) -> None:
    assert files_of(Path(folder)) == READ
    leftover = [path.name for path in Path(folder).parents[1].rglob("*.incomplete")]
    assert leftover == []


@pytest.fixture
def fetch(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetch]:
    """Downloads in this process, with the constants that huggingface_hub reads from the environment."""
    names = {"HF_ENDPOINT": "ENDPOINT", "HF_HUB_OFFLINE": "HF_HUB_OFFLINE"}  # variable -> constant
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)

    def fetch(model: str = "org/model", **more: str) -> str:
        with monkeypatch.context() as patched:
            for name, value in hub.environment(home, **more).items():
                patched.setenv(name, value)
                if name in names:
                    patched.setattr(constants, names[name], value)
            patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + template)
            patched.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
            patched.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
            folder = str(find_folder(model))
        assert_whole(folder)
        return folder

    yield fetch
    close_session()


def refused(fetch: Fetch, *model: str, **more: str) -> str:
    with pytest.raises(CheckpointError) as refusal:
        fetch(*model, **more)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_download_is_told_whole_and_kept(hub: Hub, home: Path, fetch: Fetch) -> None:
    said = Downloading(hub, home).result()
    assert_whole(answer(said, "folder"))
    assert "INFO downloading org/model: " in said
    assert "downloaded and verified" in said
    assert hub.leaked_tokens == []
    assert sorted(name for name, _ in hub.served) == sorted(READ)
    hub.served.clear()
    fetch()
    assert hub.served == []
    fetch(HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("name", ["org/other", "org/other@" + COMMIT, *SHORT_NAMES])
def test_names_lead_to_their_repository(name: str, hub: Hub, fetch: Fetch) -> None:
    hub.repository = SHORT_NAMES.get(name, "org/other")
    assert Path(fetch(name)).name == COMMIT


def test_a_token_reaches_the_hub_and_no_other_host(hub: Hub, fetch: Fetch) -> None:
    hub.token = "hf_secret"
    said = refused(fetch, HF_TOKEN="hf_wrong")
    assert "answers 401" in said
    assert "HF_TOKEN is set" in said
    assert "no HF_TOKEN is set" in refused(fetch)
    fetch(HF_TOKEN="hf_secret")
    assert hub.leaked_tokens == []


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_breaks_is_gone_on_with(hub: Hub, fetch: Fetch, reset: bool) -> None:
    hub.cut_after, hub.reset = [5000, 7000, 0], reset
    fetch()
    assert len([begin for _, begin in hub.served if begin > 0]) >= (1 if reset else 2)


def test_a_server_without_ranges_sends_it_all_again(hub: Hub, fetch: Fetch) -> None:
    hub.cut_after, hub.ranges = [5000, 7000], False
    fetch()


def test_a_line_that_stays_dead_is_told(hub: Hub, fetch: Fetch) -> None:
    hub.cut_after = [5000] + [0] * 100
    said = refused(fetch)
    assert "broke off at" in said
    assert "start again to go on" in said
    hub.cut_after = []
    fetch()


def test_a_process_that_was_killed_is_gone_on_with(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.hold_after = 5000
    first = Downloading(hub, home)
    partials = lambda: [path for path in home.rglob("*.incomplete") if path.stat().st_size >= 5000]  # noqa: E731
    wait_until(partials, "a part of a file")
    first.process.kill()
    first.wait_end()
    assert not any(path.is_file() for path in home.rglob("snapshots/**/*.safetensors"))
    hub.hold_after = None
    hub.release.set()
    hub.served.clear()
    fetch()
    assert any(begin >= 5000 for _, begin in hub.served)


def test_a_wrong_checksum_is_fetched_once_more(hub: Hub, fetch: Fetch, caplog: pytest.LogCaptureFixture) -> None:
    hub.corrupted = {VAE: 1, "vae/config.json": 1}
    with caplog.at_level(logging.INFO):
        fetch()
    said = caplog.text
    assert f"{VAE} came with a wrong checksum, and was removed" in said


def test_a_wrong_checksum_twice_is_refused_and_nothing_of_it_kept(hub: Hub, home: Path, fetch: Fetch) -> None:
    hub.corrupted = {VAE: 2}
    assert f"{VAE} came twice with a wrong checksum, and was removed" in refused(fetch)
    assert list(home.rglob("snapshots/*")) == []
    fetch()


def test_a_part_of_another_file_is_not_gone_on_with(hub: Hub, home: Path, fetch: Fetch) -> None:
    blobs = home / "hub/models--org--model/blobs"
    blobs.mkdir(parents=True)
    for size, name in ((100, VAE), (len(hub.files[TRANSFORMER]) + 1, TRANSFORMER)):
        (blobs / f"{hub.etag(name)}.sana-sprint.incomplete").write_bytes(bytes(size))
    fetch()


def test_what_is_damaged_on_the_disk_is_fetched_again(fetch: Fetch) -> None:
    folder = Path(fetch())
    with (folder / VAE).resolve().open("r+b") as file:
        file.truncate(100)
    fetch()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "main: there is no such repository or file, or HF_TOKEN may not read it"),
        (404, "answers 404 to /api/models/org/model"),
        (503, "503"),
    ],
)
def test_an_answer_that_refuses_is_told_in_one_line(hub: Hub, fetch: Fetch, status: int, words: str) -> None:
    hub.status = status
    assert words in refused(fetch)


def test_a_file_that_the_hub_lost_is_named(hub: Hub, fetch: Fetch) -> None:
    hub.missing = {VAE}
    said = refused(fetch)
    assert "404" in said
    assert VAE in said


def test_a_revision_that_is_none_is_named(fetch: Fetch) -> None:
    assert "has no revision v9" in refused(fetch, "org/model@v9")


def test_a_hub_that_is_not_there_is_told_with_its_address(fetch: Fetch, caplog: pytest.LogCaptureFixture) -> None:
    said = refused(fetch, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be asked" in said
    folder = fetch()
    assert fetch(HF_ENDPOINT="http://127.0.0.1:9") == folder
    assert "org/model: http://127.0.0.1:9 cannot be asked" in caplog.text


def test_offline_the_absent_file_is_named(fetch: Fetch) -> None:
    assert "HF_HUB_OFFLINE is set" in refused(fetch, HF_HUB_OFFLINE="1")
    folder = Path(fetch())
    (folder / VAE).unlink()
    said = refused(fetch, HF_HUB_OFFLINE="1")
    assert f"{folder / VAE} was never downloaded, and cannot be now: HF_HUB_OFFLINE is set" in said


def test_processes_with_one_cache_download_once(hub: Hub, home: Path) -> None:
    both = [Downloading(hub, home) for _ in range(2)]
    for one in both:
        assert_whole(answer(one.result(), "folder"))
    weights = sorted(name for name, _ in hub.served if name.endswith(".safetensors"))
    assert weights == sorted(name for name in FILES if name.endswith(".safetensors"))


def runs(*command: str) -> bool:
    try:
        return subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


STRANGER = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
needs_user = pytest.mark.skipif(not runs(*STRANGER), reason="needs unshare --user, to be a user with no rights")


@needs_user
def test_a_cache_that_cannot_be_written_serves_what_it_holds(
    hub: Hub, home: Path, fetch: Fetch, tmp_path: Path
) -> None:
    folder = fetch()
    locked = [home, *home.rglob("*")]
    for path in locked:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        said = Downloading(hub, home, command=STRANGER).result()
        assert answer(said, "folder") == folder
        hub.commit = "9876543210" * 4  # a new commit, which the cache cannot store
        said = Downloading(hub, home, command=STRANGER).result()
        assert answer(said, "folder") == folder
        assert "Permission denied" in said
        said = Downloading(hub, tmp_path / "home/new", command=STRANGER).result()
        assert "Permission denied" in answer(said, "refused")
    finally:
        for path in locked:
            if path.is_dir():
                path.chmod(0o755)


SMALL_DISK = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
needs_mount = pytest.mark.skipif(not runs(*SMALL_DISK, "mount -t tmpfs none /mnt"), reason="needs unshare --mount")


@needs_mount
def test_a_disk_that_is_too_small_is_told_before_anything_comes(hub: Hub, home: Path) -> None:
    home.mkdir()
    command = (*SMALL_DISK, 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(home))
    said = answer(Downloading(hub, home, command=command).result(), "refused")
    assert "more are needed in" in said
    assert "are free; make room, or set HF_HOME" in said
    assert hub.served == []


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit, to have a disk that fills")
def test_a_disk_that_fills_on_the_way_is_told(hub: Hub, home: Path, fetch: Fetch) -> None:
    said = answer(Downloading(hub, home, command=("prlimit", "--fsize=20000")).result(), "refused")
    assert "File too large" in said
    assert "make room, or set HF_HOME" in said
    assert not any(path.is_file() for path in home.rglob("snapshots/**/*"))
    fetch()
