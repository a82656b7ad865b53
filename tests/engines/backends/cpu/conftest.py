"""The library of C kernels for every set of instructions that this CPU has."""

import ctypes
import tempfile
from functools import cache
from pathlib import Path

import pytest

from engines.backends.cpu.kernels.library import Library, compile_library, find_compiler, instruction_sets

SETS = instruction_sets()


@pytest.fixture(params=SETS)
def library(request: pytest.FixtureRequest) -> Library:
    return _compiled(request.param)


@pytest.fixture(params=[name for name in SETS if "bf16" in name])
def bf16_library(request: pytest.FixtureRequest) -> Library:
    return _compiled(request.param)


@cache
def _compiled(instruction_set: str) -> Library:
    compiler = find_compiler()
    assert compiler is not None, "a C compiler is needed"
    with tempfile.TemporaryDirectory() as folder:
        return Library(ctypes.CDLL(str(compile_library(compiler, instruction_set, Path(folder)))))
