"""bench.quality.images: an engine here, engines in child processes, a server; refusals with reasons."""

import base64
import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from bench.harness.errors import BenchError
from bench.harness.server_process import running_server
from bench.quality.images.__main__ import main
from bench.quality.images.folder import ImageFolder
from bench.quality.images.layouts import ImageFile
from bench.quality.images.makers import HttpMaker, SamplingOptions
from engines.fake import expected_pixels
from engines.types import Job


def run(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    assert main(list(line)) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_an_engine_here_and_two_in_processes_make_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "--prompts",
        "tiny:5",
        "--model",
        str(folder),
        "--precision",
        "fp32",
        "--max-batch",
        "2",
        "--backend",
        "eager",
    ]
    here = run(capsys, *line, "--out", str(tmp_path / "here"))
    in_processes = run(capsys, *line, "--out", str(tmp_path / "apart"), "--workers", "2")
    assert (
        (here["missing"], here["twice"], here["made_now"])
        == (in_processes["missing"], in_processes["twice"], 5)
        == (0, 0, 5)
    )
    assert here["identity"] == in_processes["identity"]
    assert len(here["identity"]["made_by"]["weights"]) == 64
    first, second = (
        [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / name / "images").glob("*.png"))]
        for name in ("here", "apart")
    )
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) <= 1


def test_a_worker_that_cannot_load_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--prompts", "tiny:5", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--cards", "0"]
    assert main(line) == 3
    assert "model_index.json" in capsys.readouterr().err


def test_a_server_makes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(["--backend", "fake"]) as served:
        line = ["--prompts", "tiny:20", "--url", served.url, "--workers", "2", "--size", "96x64", "--samples", "2"]
        result = run(capsys, *line, "--out", str(tmp_path))
    assert (result["files"], result["missing"], result["twice"]) == (40, 0, 0)
    assert result["identity"]["made_by"]["backend"] == "fake"
    for name, entry in ImageFolder(tmp_path).finished().items():
        expected = expected_pixels(Job(entry.prompt, entry.seeds[0], 96, 64))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / name)), expected)


@pytest.mark.parametrize("line", [[], ["--model", "a", "--url", "b"], ["--model", "a", "--workers", "0"]])
def test_contradictions_are_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--prompts", "tiny:5", "--out", "x", *line])
    assert "needed is" in capsys.readouterr().err


class Moody(BaseHTTPRequestHandler):
    """A server that answers from a script of (status, seed that it claims)."""

    script: ClassVar[list[tuple[int, int]]] = []
    requests: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:  # the name that http.server calls
        info = dict.fromkeys(("checkpoint", "backend", "precision", "device"), "x")
        self._answer(200, {**info, "versions": {}, "default_size": [32, 32]})

    def do_POST(self) -> None:  # the name that http.server calls
        self.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status, seed = self.script.pop(0)
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "PNG")
        image = {"b64": base64.b64encode(file.getvalue()).decode(), "seed": seed}
        self._answer(status, {"images": [image], "prompt_truncated": True})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("retry-after", "3")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def moody() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_full_server_is_waited_for_as_it_says(moody: str) -> None:
    waits: list[float] = []
    maker = HttpMaker(moody, SamplingOptions(steps=2), wait=waits.append)
    Moody.script[:] = [(429, 0), (503, 0), (200, 7)]
    Moody.requests.clear()
    (file_result,) = maker.make([ImageFile("a.png", "a cat", (7,))])
    assert (waits, file_result.prompt_truncated, file_result.images[0].shape) == ([3.0, 3.0], True, (32, 32, 3))
    assert [(first["seed"], first["num_inference_steps"], first["guidance_scale"]) for first in Moody.requests] == [
        (7, 2, 4.5)
    ] * 3
    for script, message in [
        ((500, 7), "got 500, needed is 200"),
        ((200, 8), r"seeds \[7\], the server answered \[8\]"),
    ]:
        Moody.script[:] = [script]
        with pytest.raises(BenchError, match=message):
            maker.make([ImageFile("a.png", "a cat", (7,))])
    maker.close()


def test_no_server_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompts", "tiny:5", "--url", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 3
    assert main(["--prompts", "tiny:5", "--url", "somewhere", "--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert "ConnectionRefusedError" in message
    assert "needed is http://host:port" in message
