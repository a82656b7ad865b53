"""Configures glibc malloc before threads start; a no-op without glibc.

A batch on a CPU allocates and frees arrays of up to 32 MiB. By default each thread has a chain of 64 MiB heaps, which
such arrays fill badly, and malloc returns a heap's free end to the kernel after each batch. The process then grows and
shrinks by tens of MB for hours, and pays a page fault for each page that it gets again. With one arena that keeps its
free end, memory stays at the need of the largest batch (docs/operate/robustness.md, Load).
"""

import ctypes
from collections.abc import Mapping

# malloc.h's names and our values. Arrays larger than MMAP_THRESHOLD return to the kernel at once, as by default.
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
MALLOPT_VALUES = {ARENA_MAX: 1, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 256 * 2**20}
ENVIRONMENT_OVERRIDES = ("MALLOC_", "GLIBC_TUNABLES")  # variables that configure glibc malloc


def configure_malloc(environment: Mapping[str, str]) -> bool:
    """Returns whether it applied the values. It does not if the environment does, or if mallopt is missing."""
    if any(name.startswith(ENVIRONMENT_OVERRIDES) for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in MALLOPT_VALUES.items())
