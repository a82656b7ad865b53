"""Part of the next product's weights on their way to the L2 cache while a small kernel leaves the memory idle.

No values are read, so nothing that is computed depends on it. On cards with a cache that is large enough, which are
those with the bulk copy engine (an H100 has 50 MB); nowhere else, and never in the interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher

LINE = 64  # bf16 numbers of 128 bytes
BYTES = 10 * 2**20  # what memory brings in the 3 to 4 microseconds of such a kernel


@triton.jit
def prefetch(weight, lines, index, many, STEP: tl.constexpr):
    """Asks, as program `index` of `many`, for its share of the lines: two of every 2 * STEP."""
    lane = tl.arange(0, 512)
    for first in range(index * 512, lines, many * 512):
        line = tl.minimum(first + lane, lines - 1)
        at = (weight + ((line // 2) * (2 * STEP) + line % 2) * 64).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


def share(launch: Launcher, weight: Tensor | None) -> tuple[int, int]:
    """Lines to ask for and STEP, evenly over all of `weight`, so that every program of the product finds its part.
    STEP is 0 where nothing is asked for."""
    if not launch.tma or weight is None or weight.numel() < 2 * LINE:
        return 0, 0
    step = max(1, -(-weight.nbytes // BYTES))
    return weight.numel() // (2 * LINE * step) * 2, step
