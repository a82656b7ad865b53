"""Prefetches part of the next product's weights to the L2 cache while a small kernel leaves the memory idle.

It reads no values, so results do not depend on it. Only cards with tensor descriptors prefetch, because their cache is
large enough (50 MB on an H100); the interpreter does not.
"""

import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher

LINE = 128  # bytes
BYTES = 10 * 2**20  # what memory delivers in the 3 to 4 microseconds of such a kernel


@triton.jit
def prefetch(weight, lines, index, many, STEP: tl.constexpr):
    """Prefetches the lines of program `index` of `many`: two of every 2 * STEP."""
    LINE_VALUES: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    lane = tl.arange(0, 512)
    for first in range(index * 512, lines, many * 512):
        line = tl.minimum(first + lane, lines - 1)
        at = (weight + ((line // 2) * (2 * STEP) + line % 2) * LINE_VALUES).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


def share(launch: Launcher, weight: Tensor | None) -> tuple[int, int]:
    """Returns the number of lines and STEP, which spread the lines evenly over `weight`; STEP 0: no prefetch.

    Spread evenly, every program of the product finds a part of its weights in the cache.
    """
    if not launch.tma or weight is None or weight.nbytes < 2 * LINE:
        return 0, 0
    step = max(1, -(-weight.nbytes // BYTES))
    return weight.nbytes // (2 * LINE * step) * 2, step
