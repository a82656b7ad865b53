"""The C library is found, or compiled once, and used only where it computes right."""

import os
from pathlib import Path

import pytest
import torch

from engines.backends.cpu.kernels import checked
from engines.backends.cpu.kernels import library as c_library
from engines.backends.cpu.kernels.checked import load_library
from engines.backends.cpu.kernels.library import Library

BEST = c_library.instruction_sets()[0]


@pytest.mark.parametrize("kernel", checked.KERNELS, ids=lambda module: module.__name__)
@torch.inference_mode()
def test_a_kernel_that_computes_wrongly_is_not_used(
    kernel: object, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Idle:
        """A library whose functions do nothing."""

        panel, lanes, bf16_products = library.panel, library.lanes, True

        def run(self, *_: object) -> None: ...

    for one in checked.KERNELS:
        assert one.computes_right(library)
        assert not one.computes_right(Idle())  # type: ignore[arg-type]
        if one is not kernel:
            monkeypatch.setattr(one, "computes_right", lambda _: True)
    assert load_library(tmp_path) is not None
    monkeypatch.setattr(checked, "find_library", lambda _: Idle())
    load_library.cache_clear()
    assert load_library(tmp_path) is None
    load_library.cache_clear()


def test_finds_the_library_that_is_shipped_or_kept_before_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "shipped")
    compiler = c_library.find_compiler()
    assert compiler is not None
    cache = tmp_path / "cache"
    assert c_library.find_library(cache) is not None
    kept = cache / c_library.file_name(BEST)
    assert kept.is_file()
    assert [path.name for path in cache.iterdir()] == [kept.name]  # nothing unfinished
    with monkeypatch.context() as path:
        path.setenv("PATH", str(tmp_path / "nothing"))
        assert c_library.find_library(cache) is not None
        assert c_library.find_library(tmp_path / "empty") is None
    c_library.compile_library(compiler, BEST, tmp_path / "shipped")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert c_library.find_library(tmp_path / "empty") is not None


def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "shipped")
    kept = tmp_path / c_library.file_name(BEST)
    kept.write_bytes(b"")
    assert c_library.find_library(tmp_path) is not None
    assert kept.stat().st_size


def test_a_cache_that_cannot_be_written_costs_a_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "shipped")
    (tmp_path / "file").touch()
    assert c_library.find_library(tmp_path / "file") is not None


def test_a_compiler_that_fails_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "shipped")
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_library.find_library(tmp_path / "cache") is None


def test_an_older_compiler_makes_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "shipped")
    compiler = tmp_path / "gcc"
    own = c_library.find_compiler()
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mfma*) exit 1;; esac\nexec {own} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    library = c_library.find_library(tmp_path / "cache")
    assert library is not None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [c_library.file_name("baseline")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2", ["baseline"]),
        ("avx2 fma", ["avx2", "baseline"]),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", ["avx512", "avx2", "baseline"]),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16", ["avx512_bf16", "avx512", "avx2", "baseline"]),
        ("avx2 avx512f", ["baseline"]),
    ],
)
def test_chooses_the_instructions_that_the_cpu_has(flags: str, expected: list[str]) -> None:
    assert c_library.instruction_sets(flags) == expected


def test_the_library_runs_on_the_threads_of_torch(tmp_path: Path) -> None:
    """Threads of its own would compete with those of torch, which spin after each operation."""
    library = load_library(tmp_path)
    assert library is not None
    of_gcc = "libgomp" in Path("/proc/self/maps").read_text()
    assert bool(library.functions.shares_threads()) == of_gcc


def test_a_container_image_gets_every_set_of_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path)
    c_library.main()
    shipped = {path.name for path in tmp_path.iterdir()}
    assert shipped == {c_library.file_name(name) for name in c_library.INSTRUCTION_SETS}
