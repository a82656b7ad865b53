"""The C library compiled for one set of instructions, once in a process."""

import ctypes
from functools import cache

import pytest

from engines.backends.cpu.c_library import Library, compile_library, find_compiler


@cache
def compiled_library(instruction_set: str, factory: pytest.TempPathFactory) -> Library:
    compiler = find_compiler()
    assert compiler is not None, "a C compiler is needed"
    return Library(ctypes.CDLL(str(compile_library(compiler, instruction_set, factory.mktemp("library")))))
