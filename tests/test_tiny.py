"""The whole stack as a new user meets it: python -m server, the line it prints, and the picture behind that line."""

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

from distill.world.captions import requirement_of
from distill.world.judge import judge
from engines.types import Pixels

ROOT = Path(__file__).resolve().parents[1]


class Line(NamedTuple):
    """A curl line as the server prints it."""

    url: str
    body: str


def parsed(line: str) -> Line:
    words = shlex.split(line)
    assert words[:2] == ["curl", "-s"]
    assert words[3:5] == ["-H", "content-type: application/json"]
    assert (words[5], words[7:]) == ("-d", ["-o", "picture.png"])
    return Line(words[2], words[6])


@pytest.fixture(scope="module")
def printed() -> Iterator[Line]:
    """Starts a server with the shipped checkpoint for this file's tests; yields the command that it prints."""
    command = [sys.executable, "-m", "server", "--port", "0", "--log-level", "error"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            yield parsed(next(line for line in lines if line.startswith("curl ")))
        finally:
            process.terminate()
    assert process.returncode == 0


def picture(line: Line, **changes: object) -> Pixels:
    body = json.dumps(json.loads(line.body) | changes).encode()
    request = urllib.request.Request(line.url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["content-type"] == "image/png"
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def test_the_printed_line_draws_what_it_says(printed: Line) -> None:
    verdict = judge(picture(printed), requirement_of(json.loads(printed.body)["prompt"]))
    assert verdict.correct, verdict.reasons


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_more_steps_draw_it_too(printed: Line, steps: int) -> None:
    pixels = picture(printed, num_inference_steps=steps)
    verdict = judge(pixels, requirement_of(json.loads(printed.body)["prompt"]))
    assert verdict.correct, verdict.reasons


def test_the_readme_shows_this_line_and_this_picture(printed: Line) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = [
        parsed(line.strip().removeprefix("$ ")) for line in readme.splitlines() if line.strip().startswith("curl -s ")
    ]
    assert [line.body for line in shown] == [printed.body]
    kept = np.asarray(Image.open(ROOT / "docs/red-circle.png").convert("RGB")).astype(int)
    assert np.abs(kept - picture(printed)).mean() < 1
