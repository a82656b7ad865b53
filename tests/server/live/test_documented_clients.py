"""The clients in docs/ work as they are printed."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running_server import PATIENCE_S, Running, image_file, read_image

from engines.fake import expected_pixels
from engines.types import Job

DOCS = Path(__file__).resolve().parents[3] / "docs" / "use"


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def address(running: Running) -> str:
    return running.url.replace("http", "ws") + "/v1/live"


def test_the_python_client(plain: Running, tmp_path: Path) -> None:
    told = run(tmp_path, sys.executable, str(DOCS / "live_client.py"), address(plain)).splitlines()
    assert '"type":"ready"' in told[0]
    assert [line.split()[1] for line in told[1:]] == [str(number) for number in range(2, 12)]
    assert read_image((tmp_path / "live.jpg").read_bytes())[128, 100].min() > 200  # the line, white


def test_the_javascript_client(plain: Running, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; it runs docs/use/live_client.mjs")
    major = int(run(tmp_path, node, "--version").lstrip("v").partition(".")[0])
    if major < 20:
        pytest.skip(f"node {major} has no WebSocket; 22 has, 20 behind a flag")
    drawing = np.zeros((64, 64, 3), np.uint8)
    drawing[20:40] = 255
    (tmp_path / "drawing.png").write_bytes(image_file(drawing))
    flags = ["--experimental-websocket"] if major < 22 else []
    told = run(tmp_path, node, *flags, str(DOCS / "live_client.mjs"), address(plain), "drawing.png")
    assert told.splitlines()[-1].startswith("picture of message 2 of 2: ")
    wanted = expected_pixels(Job("a red circle", 7, 256, 256, control_image=drawing))
    shown = read_image((tmp_path / "live.jpg").read_bytes())
    assert np.abs(shown.astype(int) - wanted).mean() < 3


def test_the_clients_are_short() -> None:
    assert {path.name for path in DOCS.glob("live_client.*") if len(path.read_text().splitlines()) > 34} == set()
