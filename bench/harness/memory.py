"""Memory of a process on Linux, or of CUDA."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


@contextlib.contextmanager
def peak_rise(device: torch.device) -> Iterator[list[int]]:
    """Appends to the yielded list by how many bytes the peak within rises above what was in use before.

    On the CPU by resetting the process' peak (proc(5), clear_refs), on CUDA by the allocator's.
    """
    rises: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield rises
        rises.append(torch.cuda.max_memory_allocated(device) - before)
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    yield rises
    rises.append(_status_bytes("VmHWM") - before)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process held so far: resident, or on CUDA allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")  # not ru_maxrss, which a process inherits from the one that started it
