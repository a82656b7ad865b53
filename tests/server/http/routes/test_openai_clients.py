"""The unmodified openai client and LiteLLM generate and edit; the server answers the requests of Open WebUI.

The clients live in an environment of their own (`make clients`), so that none of their dependencies enters ours.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pybase64
import pytest
from running_server import Running, Serve, image_file, read_image

from engines.fake import expected_pixels
from engines.types import Job, Pixels

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / ".venvs" / "clients" / "bin" / "python"
IMAGE: Pixels = (np.arange(40 * 30 * 3).reshape(40, 30, 3) % 253).astype(np.uint8)
needs_clients = pytest.mark.skipif(not PYTHON.exists(), reason="needs the clients: make clients")


def job(seed: int = 5, **fields: Any) -> Job:
    return Job("a blue square", seed=seed, width=64, height=96, **fields)


def shows(b64: str, expected: Job) -> None:
    np.testing.assert_array_equal(read_image(pybase64.b64decode(b64)), expected_pixels(expected))


def run(program: str, serve: Serve, folder: Path) -> dict[str, Any]:
    """Runs a program of tests/helpers/programs against a server with the API key `right`; returns its output."""
    (folder / "keys").write_text("right\n")
    (folder / "image.png").write_bytes(image_file(IMAGE))
    running = serve(api_key_file=str(folder / "keys"))
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "helpers" / "programs" / program, f"{running.url}/v1", folder / "image.png"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # it would ask GitHub for prices
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@needs_clients
def test_the_openai_client(serve: Serve, tmp_path: Path) -> None:
    found = run("with_openai.py", serve, tmp_path)
    for i, b64 in enumerate(found["generated"]):
        shows(b64, job(5 + i))
    assert len(found["generated"]) == 2
    kind, _, content = found["url"].partition(",")
    assert kind == "data:image/png;base64"
    shows(content, job())
    (edited,) = found["edited"]
    shows(edited, job(image=IMAGE, strength=0.25))
    for seed, b64 in enumerate(found["concurrent"]):
        shows(b64, job(seed))
    assert found["models"] == ["fake"]
    assert found["refused"] == {"code": "invalid_size", "param": "width x height", "type": "invalid_request_error"}
    assert found["unauthorized"] == "invalid_api_key"


@pytest.mark.slow
@needs_clients
def test_the_example_of_the_readme(serve: Serve, tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [example for example in examples if "from openai" in example]
    adapted = example.replace("http://127.0.0.1:8000", serve().url).replace('model="tiny"', 'model="fake"')
    subprocess.run([PYTHON, "-c", adapted], cwd=tmp_path, check=True)
    assert read_image((tmp_path / "square.png").read_bytes()).shape == (256, 256, 3)


@pytest.mark.slow
@needs_clients
def test_litellm(serve: Serve, tmp_path: Path) -> None:
    found = run("with_litellm.py", serve, tmp_path)
    for i, b64 in enumerate(found["generated"]):
        shows(b64, job(5 + i))
    assert len(found["generated"]) == 2
    (edited,) = found["edited"]
    shows(edited, job(image=IMAGE, strength=0.25))
    assert "width x height" in found["refused"]


# Requests and parsing of Open WebUI (open-webui/open-webui, backend/open_webui/routers/images.py, image_generations and
# image_edits with the engine `openai`).


def read_as_open_webui(answer: httpx.Response) -> list[Pixels]:
    """Mirrors its get_image_data: base64 after a comma, or the whole text; `url` has precedence."""
    answer.raise_for_status()
    images = []
    for image in answer.json()["data"]:
        data = image.get("url") or image["b64_json"]
        images.append(read_image(pybase64.b64decode(data.split(",", 1)[1] if "," in data else data)))
    return images


@pytest.mark.parametrize(
    "body",
    [
        {"model": "dall-e-2", "prompt": "a blue square", "n": 1, "size": "64x96", "response_format": "b64_json"},
        {"model": "gpt-image-1", "prompt": "a blue square", "n": 2, "size": "64x96"},
        {"model": "", "prompt": "a blue square", "n": 1, "size": "auto", "response_format": "b64_json"},
        {"model": "x", "prompt": "a blue square", "n": 1, "response_format": "b64_json", "quality": "low", "seed": 5},
    ],
)
def test_what_open_webui_generates(plain: Running, body: dict[str, Any]) -> None:
    headers = {
        "authorization": "Bearer none",
        "x-openwebui-user-name": "A%20B",
        "x-openwebui-user-id": "1",
        "x-openwebui-user-email": "a@b.example",
        "x-openwebui-user-role": "admin",
    }
    answer = plain.client.post("/v1/images/generations?api-version=2025-04-01-preview", json=body, headers=headers)
    images = read_as_open_webui(answer)
    assert len(images) == body["n"]
    assert images[0].shape == ((96, 64, 3) if body.get("size") == "64x96" else (256, 256, 3))


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_what_open_webui_edits(plain: Running, name: str) -> None:
    form = {"model": "gpt-image-1", "prompt": "a blue square", "n": "1", "size": "64x96", "response_format": "b64_json"}
    files = {name: ("5d1d5bd0.png", image_file(IMAGE), "image/png")}
    answer = plain.client.post("/v1/images/edits", data=form, files=files, headers={"authorization": "Bearer some-key"})
    (edited,) = read_as_open_webui(answer)
    seed = answer.json()["data"][0]["seed"]
    np.testing.assert_array_equal(edited, expected_pixels(job(seed, image=IMAGE)))
