"""A packed kit runs on a host that has PyTorch alone and no network."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bench.acceptance.kit import threads
from bench.acceptance.kit.__main__ import main
from bench.acceptance.kit.calls import CALLS
from bench.acceptance.kit.contents import MOST_BYTES

# A host's packages: PyTorch for CUDA and its dependencies.
FOLDERS = "torch torchgen functorch triton numpy numpy.libs sympy mpmath networkx jinja2 markupsafe setuptools"
PINS = "torch triton numpy sympy mpmath networkx jinja2 markupsafe setuptools filelock fsspec typing_extensions"
MORE = "filelock fsspec typing_extensions.py _distutils_hack"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a Python that has PyTorch and pip."""
    folder = tmp_path_factory.mktemp("host")
    base = Path(sys.base_prefix) / "bin" / Path(sys.executable).name
    subprocess.run([base, "-m", "venv", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_path("purelib"))
    found = [here / name for name in f"{FOLDERS} {MORE}".split()]
    found += [path for name in PINS.split() for path in here.glob(f"{name}-*.dist-info")]
    for path in found:
        if path.exists() and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_call_passes_where_only_pytorch_is(call: str, host: Path, tmp_path: Path) -> None:
    kit, out = tmp_path / "kit", tmp_path / "out"
    assert main(["--out", str(kit), "--python", f"{sys.version_info.major}.{sys.version_info.minor}"]) == 0
    assert sum(path.stat().st_size for path in kit.rglob("*") if path.is_file()) < MOST_BYTES
    closed = {"PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    own = {**os.environ, **closed, "no_proxy": "127.0.0.1", "PYTHON": str(host), "OUT": str(out)}
    command = ["bash", str(kit / "run.sh"), call, "--rehearse"]
    for _ in range(2):
        done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads((out / "acceptance.json").read_text())
    assert found["machine"]["revision"] == (kit / "REVISION").read_text().strip()
    assert not [step["name"] for step in found["steps"] if "error" in step]
    assert set(found["skipped"]) <= {"served native bf16"}
    names = [step["name"] for step in found["steps"]]
    assert len(names) == len(set(names)), "what was done was done again"


@pytest.mark.gpu
def test_threads_are_compared_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert threads.main(["--model", "tiny", "--runs", "1", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["threads"] for row in found["rows"]} == {1, os.cpu_count()}
