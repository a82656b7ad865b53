"""Kernels are compiled where there is no C compiler, but what one compiled before, as in a container image."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from engines.artifacts.native.compiling import CompileRequest
from engines.artifacts.vendors import VENDORS
from engines.kernels import launch_code

ROOT = Path(__file__).resolve().parents[3]
NATIVE = next(vendor for vendor in VENDORS if vendor.launches_through_c)

_COMPILE = """
import json, sys
from engines.artifacts.native.compiling import CompileRequest, compile_kernels
print(compile_kernels(CompileRequest(**json.loads(sys.argv[1])), 1))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the engines, with the libraries that the build of an image compiles."""
    root = tmp_path_factory.mktemp("image")
    shutil.copytree(ROOT / "engines", root / "engines", ignore=shutil.ignore_patterns("compiled", "__pycache__"))
    subprocess.run([sys.executable, "-m", "engines.kernels.launch_code"], cwd=root, check=True)
    return root


def compiled_without_c(image: Path, scratch: Path, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """Compiles some kernels of an engine into scratch/kernels, in the image, with no program but env."""
    (scratch / "bin").mkdir()
    env = shutil.which("env")
    assert env is not None
    (scratch / "bin" / "env").symlink_to(env)
    request = CompileRequest(str(checkpoint), None, [(64, 64)], [1], {}, (8, 9), str(scratch / "kernels"), of=40)
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    return subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(asdict(request))],
        cwd=image,
        env={**environment, "PATH": str(scratch / "bin"), "TRITON_CACHE_DIR": str(scratch / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_image_compiles_kernels_without_a_c_compiler(image: Path, tmp_path: Path, small_checkpoint: Path) -> None:
    done = compiled_without_c(image, tmp_path, small_checkpoint)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    kernels = tmp_path / "kernels"
    assert list(kernels.glob("*/*.cubin"))
    (module,) = kernels.glob("*/cuda_utils*")
    (shipped,) = (image / "engines/kernels/compiled").glob("*/cuda_utils.so")
    assert module.read_bytes() == shipped.read_bytes()


_LOAD = """
import ctypes
from triton import knobs
from triton.backends.nvidia.driver import CudaUtils
from engines.kernels.launch_code import compiled_folder, load_compiled_module
load_compiled_module()
ctypes.CDLL(str(compiled_folder() / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
knobs.nvidia.libcuda_path = str(compiled_folder())
print(CudaUtils().launch.__name__)
"""


def test_a_server_loads_no_library_from_a_cache(image: Path, tmp_path: Path) -> None:
    """Docker's tmpfs holds none that can be executed, and Triton's cache lies in one."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD],
        cwd=image,
        env={**os.environ, "PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "launch\n"), done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_libraries_of_another_triton_are_not_used(image: Path, tmp_path: Path, small_checkpoint: Path) -> None:
    other = Path(shutil.copytree(image, tmp_path / "other"))
    (folder,) = (other / "engines/kernels/compiled").iterdir()
    folder.rename(folder.with_name("another"))
    done = compiled_without_c(other, tmp_path, small_checkpoint)
    assert done.returncode == 1
    assert "no C compiler is found" in done.stderr


@pytest.mark.parametrize("shipped", [True, False])
def test_a_build_needs_a_compiler_or_its_output(image: Path, shipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image / "engines/kernels/compiled"
    monkeypatch.setattr(launch_code, "FOLDER", folder if shipped else folder / "nothing")
    assert NATIVE.missing(which=lambda _: None) == (() if shipped else ("gcc or clang",))
