"""The first steps of a new user: python -m server, its printed curl line, and that line's image."""

import io
import json
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from distill.world.captions import parse_caption
from distill.world.judge import judge
from engines.types import Pixels

ROOT = Path(__file__).resolve().parents[1]


class Line(NamedTuple):
    """URL and body of a printed curl line."""

    url: str
    body: str


def parsed(line: str) -> Line:
    words = shlex.split(line)
    assert words[:2] == ["curl", "-s"]
    assert words[3:5] == ["-H", "content-type: application/json"]
    assert (words[5], words[7], Path(words[8]).suffix, words[9:]) == ("-d", "-o", ".png", [])
    return Line(words[2], words[6])


@pytest.fixture(scope="module")
def printed() -> Iterator[Line]:
    """Runs a server of the shipped checkpoint for this file's tests, and yields its printed curl line."""
    command = [sys.executable, "-m", "server", "--port", "0", "--log-level", "error"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            yield parsed(next(line for line in lines if line.startswith("curl ")))
        finally:
            process.terminate()
    assert process.returncode == 0


def generate(line: Line, **changes: object) -> Pixels:
    body = json.dumps(json.loads(line.body) | changes).encode()
    request = urllib.request.Request(line.url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["content-type"] == "image/png"
        return np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"))


def test_the_printed_line_gives_the_right_image(printed: Line) -> None:
    verdict = judge(generate(printed), parse_caption(json.loads(printed.body)["prompt"]))
    assert verdict.correct, verdict.reasons


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_more_steps_give_the_right_image_too(printed: Line, steps: int) -> None:
    pixels = generate(printed, num_inference_steps=steps)
    verdict = judge(pixels, parse_caption(json.loads(printed.body)["prompt"]))
    assert verdict.correct, verdict.reasons


def test_the_readme_shows_this_line_and_this_image(printed: Line) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = [
        parsed(line.strip().removeprefix("$ ")) for line in readme.splitlines() if line.strip().startswith("curl -s ")
    ]
    assert [line.body for line in shown] == [printed.body]
    documented = np.asarray(Image.open(ROOT / "docs/red-circle.png").convert("RGB")).astype(int)
    assert np.abs(documented - generate(printed)).mean() < 1
