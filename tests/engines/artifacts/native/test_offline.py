"""Launches the kernels of an engine in a process that cannot compile."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from native_engines import launched, spec

from engines.artifacts.native.compiling import CompileRequest, compile_kernels
from engines.build.builder import build
from engines.kernels.launch_code import c_compiler


def test_launches_compile_nothing(for_hopper: Path, tmp_path: Path) -> None:
    """Launches some kernels from a moved, read-only folder."""
    moved = Path(shutil.copytree(for_hopper, tmp_path / "moved"))
    for path in moved.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    launches, looked_up, compiled, failed = launched(moved, tmp_path)
    assert compiled == []
    assert failed == 0
    assert launches == looked_up > 3
    assert not list((tmp_path / "empty").rglob("*.*"))


def test_kernels_are_for_the_card(for_hopper: Path, for_ada: Path) -> None:
    for folder, arch in ((for_hopper, 90), (for_ada, 89)):
        about = [path for path in folder.glob("kernels/*/*.json") if not path.name.startswith("__grp__")]
        found = [json.loads(path.read_text())["target"] for path in about]
        assert len(found) > 3
        assert {(target["backend"], target["arch"]) for target in found} == {("cuda", arch)}


def test_it_compiles_where_another_libcuda_is_loaded(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's launchers find the libcuda of a machine with a GPU, which has no context and fails every launch."""
    source, libcuda = tmp_path / "libcuda.c", tmp_path / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 201; }}\n" for name in ("cuInit", "cuLaunchKernelEx")))
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([c_compiler(), "-shared", "-fPIC", soname, "-o", str(libcuda), str(source)], check=True)
    (tmp_path / "sitecustomize.py").write_text(f"import ctypes\nctypes.CDLL({str(libcuda)!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cache = tmp_path / "kernels"
    request = CompileRequest(str(small_checkpoint), None, [(64, 64)], [1], {}, (9, 0), str(cache), of=40)
    assert compile_kernels(request, 1) == {}
    assert list(cache.glob("*/*.cubin"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])
def test_all_launches_compile_nothing(gpu: str, precision: str, ours: Path, tmp_path: Path) -> None:
    build(spec(ours, tmp_path / "engine", gpu, precision))
    launches, looked_up, compiled, failed = launched(tmp_path / "engine", tmp_path, whole=True)
    assert (compiled, failed) == ([], 0)
    assert launches == looked_up > 30
