"""Peak memory of this process on Linux, or of CUDA."""

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
    """Appends to the yielded list the bytes by which the peak within rises above the use before.

    On the CPU it resets the process' peak (proc(5), clear_refs), on CUDA the allocator's.
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
    """Returns the most memory this process has held: resident, or allocated on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")  # not ru_maxrss, which a process inherits from the one that started it
