"""Compute threads of an engine's calls on a CPU.

A thread that sleeps while it waits takes some 0.1 ms to wake on a virtual machine. The operations of a narrow model end
before: tiny takes 57 ms an image with two such threads, and 40 with one (bench/LOG.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NARROW = 512  # of a transformer's width; the published ones have 1152 and 2240


def choose_threads(width: int, reasons: dict[str, str]) -> int | None:
    """Returns 1 for a transformer too narrow to share its operations between threads that sleep, and adds the reason.

    None leaves torch's number.
    """
    if width >= NARROW or torch.get_num_threads() == 1:
        return None
    reasons["compute threads"] = "1: a checkpoint this narrow is slower with more, as they sleep while they wait"
    return 1


@contextmanager
def compute_threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads within the block; None leaves it."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
