"""python -m server --engine DIR as a process: images of built engines over HTTP, and refused folders."""

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.backends.openvino import has_bf16
from engines.build import builder as building
from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.types import Engine, Job
from server.errors import EXIT_START

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
pytest.importorskip("onnx", reason="the extra 'build' is not installed")

pytestmark = pytest.mark.slow  # builds engines and starts servers; tests/engines/build does without the latter

ROOT = Path(__file__).parents[2]
JOBS = [Job("a red circle", 3, 64, 64), Job("three green triangles", 4, 64, 64, 2, 4.1), Job("a cat", 5, 64, 64, 4)]


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds engines on demand. Exports once: OpenVINO rounds by itself, so both precisions share their graphs."""
    place, export = tmp_path_factory.mktemp("engines"), building.export_onnx

    def export_or_copy(module: object, name: str, inputs: object, path: Path) -> None:
        if not (place / f"{name}.onnx").exists():
            export(module, name, inputs, place / f"{name}.onnx")  # type: ignore[arg-type]  # passed on
        shutil.copy(place / f"{name}.onnx", path)

    def built(precision: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "export_onnx", export_or_copy)
            build(BuildSpec(str(model), "cpu", precision, place / precision, batches=(1, 2)))
        return place / precision

    return built


def started(stack: ExitStack, model: Path, folder: Path) -> str:
    """Returns the address of a server with built engines; `stack` ends it."""
    command = [sys.executable, "-m", "server", "--port", "0", "--model", str(model), "--engine", str(folder)]
    process = stack.enter_context(
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    stack.callback(process.terminate)
    assert process.stdout is not None
    info = ""
    for line in process.stdout:
        info += line
        if found := re.search(r"curl -s (http://127\.0\.0\.1:\d+)/generate", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would block the server
            return found.group(1)
    pytest.fail(info)


@pytest.fixture(scope="module")
def served(model: Path, engines: Callable[[str], Path]) -> Iterator[Callable[[str], str]]:
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def at(precision: str) -> str:
            if precision not in urls:
                urls[precision] = started(stack, model, engines(precision))
            return urls[precision]

        yield at


def generated(url: str, job: Job) -> NDArray[np.int64]:
    body = {"prompt": job.prompt, "seed": job.seed, "width": job.width, "height": job.height}
    body |= {"num_inference_steps": job.steps, "guidance_scale": job.guidance_scale}
    answer = httpx.post(f"{url}/generate", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.steps} steps")
def test_images_in_fp32_equal_eager(job: Job, served: Callable[[str], str], eager: Engine) -> None:
    actual, expected = generated(served("fp32"), job), eager.generate([job])[0].pixels.astype(int)
    assert expected.std() > 10
    assert abs(actual - expected).max() <= 2


def test_the_server_says_what_it_serves(served: Callable[[str], str]) -> None:
    info = httpx.get(f"{served('fp32')}/v1/info").json()
    assert (info["backend"], info["precision"]) == ("openvino", "fp32")
    assert info["manifest"]["gpu"] == "cpu"
    assert info["manifest"]["pictures"]["64x64"]["gate"]
    refused = httpx.post(f"{served('fp32')}/generate", json={"prompt": "x", "width": 96, "height": 64})
    assert refused.status_code == 422
    assert "64x64" in refused.text


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
def test_images_in_bf16_stay_near_eager(served: Callable[[str], str], eager: Engine) -> None:
    url = served("bf16")
    for job in (JOBS[0], replace(JOBS[0], seed=9, prompt="a blue square")):
        noise = float(((generated(url, job) - eager.generate([job])[0].pixels.astype(int)) ** 2).mean())
        assert 0 < noise <= 255**2 / 10**3.5, "PSNR below 35 dB, or not rounded at all"


def test_a_server_does_not_start_with_a_truncated_engine(
    model: Path, engines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(engines("fp32"), tmp_path / "engines")
    os.truncate(folder / "decoder-64x64.bin", 10)
    command = [sys.executable, "-m", "server", "--port", "0", "--model", str(model), "--engine", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    info = done.stdout + done.stderr
    assert done.returncode == EXIT_START
    [line] = [line for line in info.splitlines() if "cannot start" in line]
    assert re.search(r"decoder-64x64\.bin has 10 bytes, \d+ were built; build it again: python build_engine\.py", line)
    assert "Traceback" not in info
