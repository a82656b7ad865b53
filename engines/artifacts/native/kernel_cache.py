"""Kernels that were compiled ahead, found again where they run: no compiler is asked there.

Triton keeps a folder of what it compiled, by a key of its own files, the kernel's text, the architecture, and the types
of the arguments. A native engine brings such a folder (engines.artifacts.native.offline fills it); `use_compiled` makes
a process look there first, so that it needs neither ptxas nor a C compiler.
"""

import hashlib
import importlib
import json
import pkgutil
import platform
import sys
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime import build
from triton.runtime.cache import FileCacheManager, triton_key
from triton.runtime.jit import JITFunction

import engines.kernels


def use_compiled_kernels(folder: Path) -> None:
    """From now on Triton takes kernels from `folder`, which is only read, before it looks where it looked before."""
    stable_cache_keys()
    before = knobs.cache.manager_class or FileCacheManager

    class Compiled(before):  # type: ignore[misc,valid-type]  # whatever class Triton was told of
        def __init__(self, key: str, override: bool = False, dump: bool = False):
            shipped = not override and not dump and (folder / key).is_dir()
            self._own: Path | None = folder / key if shipped else None
            if not shipped:
                super().__init__(key, override, dump)
            self.key = key

        def get_file(self, filename: str) -> str | None:
            if self._own is None:
                found: str | None = super().get_file(filename)
                return found
            return str(self._own / filename) if (self._own / filename).is_file() else None

        def get_group(self, filename: str) -> dict[str, str] | None:
            """As the group's file has it, but here: it was written where the folder was built."""
            if self._own is None:
                group: dict[str, str] | None = super().get_group(filename)
                return group
            listed = self._own / f"__grp__{filename}"
            if not listed.is_file():
                return None
            names = json.loads(listed.read_text())["child_paths"]
            return {name: str(self._own / name) for name in names}

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            if self._own is not None:  # what was found could not be used: make it anew beside the other ones
                super().__init__(self.key)
                self._own = None
            path: str = super().put(data, filename, binary)
            return path

    knobs.cache.manager_class = Compiled


def stable_cache_keys() -> None:
    """Makes Triton's keys the same in every process that calls this before it launches.

    Its key of what it compiles from C asks platform.architecture, whose answer depends on whether the machine has the
    program `file`; what is compiled does not. Its key of a kernel holds the constants of those functions alone that
    happened to have a key before (DependenciesFinder._update_hash), so all get theirs here, in one order.
    """
    build.platform_key = lambda: f"{platform.machine()},{platform.system()}"
    names = [found.name for found in pkgutil.walk_packages(engines.kernels.__path__, "engines.kernels.")]
    for module in map(importlib.import_module, sorted(names)):
        for _, value in sorted(vars(module).items()):
            if isinstance(value, JITFunction):
                _ = value.cache_key


def cache_key_versions() -> dict[str, str]:
    """Of what decides the keys of the folder, and whether its C parts can be loaded; of Triton also which build it is,
    as each has keys of its own."""
    build = hashlib.sha256(triton_key().encode()).hexdigest()[:12]
    return {"triton": f"{triton.__version__} ({build})", "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
