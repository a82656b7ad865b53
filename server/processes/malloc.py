"""How the C library keeps memory, told once, before threads and engine are there. Does nothing without glibc.

A batch on a CPU takes and frees arrays of up to 32 MiB. As glibc comes, each thread has a chain of heaps of 64 MiB,
which such arrays fill badly, and what is free at a heap's end is given back and taken again batch after batch: the
process grows and shrinks by tens of MB for hours, and pays a page fault for each page that it gets back. With one arena
that keeps its end, it holds what its largest batch needed, and stays there (docs/operate/robustness.md, Load).
"""

import ctypes
from collections.abc import Mapping

# malloc.h's names, and what they are set to. Larger arrays than the second are given back at once, as by default.
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
CHOICES = {ARENA_MAX: 1, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 256 * 2**20}
THEIRS = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which glibc is told otherwise


def configure_malloc(environment: Mapping[str, str]) -> bool:
    """Says whether it chose: not where the environment does, nor where the C library is none that can be told."""
    if any(name.startswith(THEIRS) for name in environment):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    return tell is not None and all(tell(name, value) == 1 for name, value in CHOICES.items())
