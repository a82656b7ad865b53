"""Makes Triton find kernels that were compiled ahead of time, without ptxas or a C compiler.

Triton caches compiled kernels by a key of its own files, the kernel's source, the architecture and the argument types.
A native engine ships such a cache (engines.artifacts.native.offline fills it); `use_compiled_kernels` reads it first.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime.cache import FileCacheManager, triton_key

from engines.kernels.cache_keys import stable_cache_keys


def use_compiled_kernels(folder: Path) -> None:
    """Makes Triton look for kernels in `folder` first, which it only reads, and in its own cache after that."""
    stable_cache_keys()
    configured = knobs.cache.manager_class or FileCacheManager

    class Compiled(configured):  # type: ignore[misc,valid-type]  # a class known at run time only
        def __init__(self, key: str, override: bool = False, dump: bool = False):
            shipped = not override and not dump and (folder / key).is_dir()
            self._own: Path | None = folder / key if shipped else None
            if not shipped:
                super().__init__(key, override, dump)
            self.key = key

        def get_file(self, filename: str) -> str | None:
            if self._own is None:
                path: str | None = super().get_file(filename)
                return path
            return str(self._own / filename) if (self._own / filename).is_file() else None

        def get_group(self, filename: str) -> dict[str, str] | None:
            """Returns the files of the group by name, in this folder: the stored paths are those of the build."""
            if self._own is None:
                group: dict[str, str] | None = super().get_group(filename)
                return group
            record = self._own / f"__grp__{filename}"
            if not record.is_file():
                return None
            names = json.loads(record.read_text())["child_paths"]
            return {name: str(self._own / name) for name in names}

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            if self._own is not None:  # the shipped kernel is unusable: Triton compiles it into its own cache
                super().__init__(self.key)
                self._own = None
            path: str = super().put(data, filename, binary)
            return path

    knobs.cache.manager_class = Compiled


def cache_key_versions() -> dict[str, str]:
    """Returns the versions on which the cache's keys and C modules depend; each build of Triton has its own keys."""
    build = hashlib.sha256(triton_key().encode()).hexdigest()[:12]
    return {"triton": f"{triton.__version__} ({build})", "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
