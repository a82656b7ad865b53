"""A small kernel that can be launched before the kernel ahead of it has ended (programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_one(x, size: tl.constexpr, programmatic: tl.constexpr):
    """Adds 1 to x [size]. programmatic: lets the next kernel start, and waits for the one ahead before it reads."""
    if programmatic:
        gdc_launch_dependents()
        gdc_wait()
    at = x + tl.arange(0, size)
    tl.store(at, tl.load(at) + 1)
