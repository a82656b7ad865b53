"""The library of our C kernels for this CPU: shipped compiled, in the cache folder, or compiled once with a C compiler.

A container image has it compiled at its build, for every instruction set, because it has no C compiler and may be
mounted without the right to execute what it writes:

    python -m engines.backends.cpu.kernels.library        into FOLDER, where every process looks first

Without any of the three, the decoder runs on oneDNN's convolutions.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engines.device.hardware import cpu_flags, expanded

SOURCES = Path(__file__).parent / "c"
FOLDER = Path(__file__).parent / "compiled"
COMPILERS = ("gcc", "clang", "cc")
OPTIONS = ("-O3", "-fPIC", "-pthread", "-w")

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma")
# Best first: the flags of /proc/cpuinfo that each needs; a compiler's options have the same names without "_".
INSTRUCTION_SETS: Mapping[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma"),
    "baseline": (),
}


@dataclass(frozen=True)
class Library:
    """The C functions, each of which takes a structure of arguments."""

    functions: ctypes.CDLL

    @property
    def panel(self) -> int:
        """Returns what divides the channels of a convolution."""
        return int(self.functions.panel())

    @property
    def lanes(self) -> int:
        """Returns what divides the channels of a gate, and the lengths of rows that are rounded."""
        return int(self.functions.lanes())

    @property
    def bf16_products(self) -> bool:
        return bool(self.functions.bf16_products())

    def run(self, name: str, arguments: ctypes.Structure) -> None:
        """Calls a function. Raises MemoryError if it could not allocate its scratch memory."""
        if self.functions[name](ctypes.byref(arguments)):
            raise MemoryError(f"cpu: no memory for {name}")


def instruction_sets(flags: str | None = None) -> list[str]:
    """Returns those that this CPU has, best first. flags: as in /proc/cpuinfo."""
    own = set((cpu_flags() if flags is None else flags).split())
    return [name for name, needed in INSTRUCTION_SETS.items() if own.issuperset(needed)]


def find_library(folder: Path) -> Library | None:
    """Loads the library for this CPU; compiles it into the cache `folder` if it is nowhere. None if that fails too.

    An older compiler may not know the best instructions; then the next set is tried.
    """
    cached, compiler = expanded(folder), find_compiler()
    for name in instruction_sets():
        library = _kept(name, cached)
        if library is None and compiler is not None:
            library = _compiled(compiler, name, cached)
        if library is not None:
            return library
    return None


def _kept(instruction_set: str, cached: Path | None) -> Library | None:
    for folder in (FOLDER, cached):
        path = None if folder is None else folder / file_name(instruction_set)
        if path is not None and path.is_file():
            with contextlib.suppress(OSError):  # damaged, or on a file system that nothing is executed from
                return Library(ctypes.CDLL(str(path)))
    return None


def find_compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name)) is not None), None)


def file_name(instruction_set: str) -> str:
    """Returns a name that changes with the source, the options and the kind of machine."""
    machine = f"{platform.system()} {platform.machine()}"
    parts = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]
    parts += [" ".join(options(instruction_set)).encode(), machine.encode()]
    return f"kernels-{instruction_set}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def options(instruction_set: str) -> list[str]:
    return [*OPTIONS, *(f"-m{flag.replace('_', '')}" for flag in INSTRUCTION_SETS[instruction_set])]


def compile_library(compiler: str, instruction_set: str, folder: Path) -> Path:
    """Compiles into `folder`, which it makes. Raises OSError or subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(instruction_set)
    command = [compiler, *options(instruction_set)]
    with tempfile.TemporaryDirectory(dir=folder) as unfinished, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compile_one(source: Path) -> str:
            compiled = f"{unfinished}/{source.stem}.o"
            subprocess.run([*command, "-c", "-o", compiled, str(source)], check=True, capture_output=True)
            return compiled

        linked = Path(unfinished) / path.name
        parts = list(threads.map(compile_one, sorted(SOURCES.glob("*.c"))))
        subprocess.run([*command, "-shared", "-o", str(linked), *parts], check=True, capture_output=True)
        linked.chmod(0o644)
        os.replace(linked, path)  # another process may compile the same at this time
    return path


@cache
def _compiled(compiler: str, instruction_set: str, folder: Path | None) -> Library | None:
    """Loads what it compiles; from a temporary folder where the cache cannot be written. Once in a process."""
    with tempfile.TemporaryDirectory() as temporary:
        for where in (folder, Path(temporary)):
            if where is not None:
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    return Library(ctypes.CDLL(str(compile_library(compiler, instruction_set, where))))
    return None


def main() -> None:
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("no C compiler is found; install gcc and try again")
    x86 = platform.machine() == "x86_64"
    for name in INSTRUCTION_SETS if x86 else ("baseline",):
        print(compile_library(compiler, name, FOLDER))


if __name__ == "__main__":
    main()
