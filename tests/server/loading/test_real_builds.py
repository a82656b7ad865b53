"""python -m server --engine auto with the builder for CPUs, as processes."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from program import PROCESS_S, ROOT, Server
from running_server import wait_until
from small_checkpoint import save_checkpoint

from engines.types import Engine, Job

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

pytestmark = pytest.mark.slow  # builds engines and starts servers; test_automatic.py has all of it with a stand-in

REQUESTS = 2000
BUILD_S = 600.0


@pytest.fixture
def started(model: Path, tmp_path: Path) -> Iterator["Starter"]:
    starter = Starter(model, tmp_path / "cache")
    yield starter
    for server in starter.servers:
        server.process.terminate()
        server.wait_end()


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with engines that a first server built; tests only read it."""
    starter = Starter(model, tmp_path_factory.mktemp("built"))
    server = starter()
    server.wait_ready()
    server.process.terminate()
    server.wait_end()
    assert server.output.count("[3/11]") == 0, "the builder's own lines stay its own"
    assert "compilation of the decoder at 64x64" in server.output
    return starter.cache


class Starter:
    """Starts servers on one cache."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model = model
        self.cache = cache
        self.servers: list[Server] = []

    def __call__(self, *flags: str, model: Path | None = None) -> Server:
        asked = [
            "--model",
            str(model or self.model),
            "--engine",
            "auto",
            "--cache",
            str(self.cache),
            "--max-batch",
            "2",
        ]
        self.servers.append(Server(*asked, *flags))
        return self.servers[-1]

    @property
    def engines(self) -> list[str]:
        folder = self.cache / "engines"
        return [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []


def info(server: Server) -> dict[str, object]:
    told: dict[str, object] = httpx.get(f"{server.wait_ready()}/v1/info").json()
    return told


def signed_pixels(content: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def wait_for(server: Server, words: str) -> None:
    wait_until(lambda: words in server.output or server.process.poll() is not None, words, within_s=PROCESS_S)
    assert words in server.output, server.output


def test_the_second_start_finds_what_the_first_built(built: Path, started: "Starter") -> None:
    started.cache = built
    server = started()
    told = info(server)
    assert told["backend"] == "openvino"
    assert "reference of the transformer" not in server.output
    assert len(started.engines) == 1


def test_two_servers_on_one_volume_build_once(started: "Starter") -> None:
    first, second = started(), started()
    assert [info(server)["backend"] for server in (first, second)] == ["openvino", "openvino"]
    assert len(started.engines) == 1
    steps = [server.output.count("building for openvino: compilation") for server in (first, second)]
    assert sorted(steps) == [0, 3]


def builder_of(server: Server) -> int:
    """Returns the process id of its builder."""
    children = Path(f"/proc/{server.process.pid}/task")
    found = [child for task in children.iterdir() for child in (task / "children").read_text().split()]
    for child in found:
        if b"build_engine.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("no builder is there")


def test_a_builder_killed_in_the_middle(started: "Starter") -> None:
    server = started()
    wait_for(server, "export of the decoder")
    os.kill(builder_of(server), signal.SIGKILL)
    told = info(server)
    assert told["backend"] == "eager"
    assert "killed by SIGKILL" in told["reasons"]["engine"]  # type: ignore[index]  # of JSON
    assert started.engines == []
    assert info(started())["backend"] == "openvino"


def test_a_server_killed_in_the_middle_keeps_nothing_locked(started: "Starter") -> None:
    server = started()
    wait_for(server, "export of the decoder")
    server.process.kill()
    server.wait_end()
    assert info(started())["backend"] == "openvino"


def test_a_full_disk_leaves_pytorch(model: Path, tmp_path: Path) -> None:
    """The builder inherits the limit of file sizes."""
    limited = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module('server', run_name='__main__', alter_sys=True)\n"
    )
    arguments = ["--model", str(model), "--engine", "auto", "--cache", str(tmp_path), "--port", "0", "--max-batch", "2"]
    command = [sys.executable, "-c", limited, "server", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if line.startswith("curl"):
                break
        process.terminate()
        process.stdout.read()
    assert "file size limit reached while writing" in told
    assert "PyTorch serves" in told
    assert [path for path in (tmp_path / "engines").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("case", ["wrong version", "wrong checkpoint"])
def test_what_does_not_fit_is_built_anew(case: str, built: Path, started: "Starter", tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(built), str(started.cache)], check=True)
    [name] = started.engines
    model = started.model
    if case == "wrong version":
        manifest = started.cache / "engines" / name / "manifest.json"
        values = json.loads(manifest.read_text())
        values["versions"]["openvino"] = "2020.1"
        manifest.write_text(json.dumps(values))
        (started.cache / "engines" / name).rename(started.cache / "engines" / "earlier")
    else:
        model = save_checkpoint(tmp_path / "other", interpolation_scale=2.0)
        (model / "sprint.json").write_text('{"default_size": [64, 64], "max_prompt_tokens": 200}')
        weights = next((model / "transformer").glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    server = started(model=model)
    assert info(server)["backend"] == "openvino"
    assert ("built by openvino 2020.1" if case == "wrong version" else "of other weights") in server.output
    assert len(started.engines) == 2
    listing = subprocess.run(
        [sys.executable, "build_engine.py", "--prune", str(started.cache / "engines")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert listing.count("removed") == (1 if case == "wrong version" else 0)


def test_swap_under_load_loses_nothing_and_answers_nothing_wrong(started: "Starter", eager: Engine) -> None:
    server = started("--serve-while-building", "--max-queue", "1000", "--timeout-ms", "600000")
    url = server.wait_ready()
    assert httpx.get(f"{url}/v1/info").json()["backend"] == "eager"
    seeds = 8
    expected = [eager.generate([Job("a cat", seed, 64, 64)])[0].pixels.astype(int) for seed in range(seeds)]

    with httpx.Client(base_url=url, timeout=BUILD_S) as client, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> str | None:
            body = {"prompt": "a cat", "seed": number % seeds, "width": 64, "height": 64}
            answer = client.post("/generate", json=body)
            if answer.status_code != 200:
                return answer.text
            off = abs(signed_pixels(answer.content) - expected[number % seeds]).max()
            return None if off <= 2 else f"request {number}: off by {off}"

        wrong = []
        asked = 0
        backend = "eager"
        # As many as REQUESTS at least, and on until a quarter of them came after the change.
        after = 0
        while asked < REQUESTS or after < REQUESTS // 4:
            wrong += [told for told in pool.map(ask, range(asked, asked + 100)) if told is not None]
            asked += 100
            after += 100 if backend == "openvino" else 0
            backend = client.get("/v1/info").json()["backend"]
            assert server.process.poll() is None, server.output
        assert wrong == []
        assert f'sana_sprint_requests_total{{route="/generate",status="200"}} {asked}.0' in client.get("/metrics").text
