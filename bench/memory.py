"""Memory of a process on Linux, and work in a process of its own, whose memory is then its alone."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


@contextlib.contextmanager
def rise(device: torch.device) -> Iterator[list[int]]:
    """Appends to the yielded list by how many bytes the peak within rises above what was in use before.

    On the CPU by resetting the process' peak (proc(5), clear_refs), on CUDA by the allocator's.
    """
    risen: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield risen
        risen.append(torch.cuda.max_memory_allocated(device) - before)
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    yield risen
    risen.append(_status_bytes("VmHWM") - before)


def in_own_process(function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
    """function(...) in a fresh interpreter, with its exceptions."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments, **options).result()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process held so far: resident, or on CUDA allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")  # not ru_maxrss, which a process inherits from the one that started it
