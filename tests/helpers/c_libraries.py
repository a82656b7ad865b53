"""The C library compiled for one set of instructions, once in a process."""

import ctypes
import tempfile
from functools import cache
from pathlib import Path

from engines.backends.cpu.c_library import Library, compile_library, find_compiler


@cache
def compiled_library(instruction_set: str) -> Library:
    compiler = find_compiler()
    assert compiler is not None, "a C compiler is needed"
    with tempfile.TemporaryDirectory() as folder:
        return Library(ctypes.CDLL(str(compile_library(compiler, instruction_set, Path(folder)))))
