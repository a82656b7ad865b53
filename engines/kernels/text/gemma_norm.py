"""Gemma's norms of x [M, D] in fp32: alone, or x + norm(y) * post followed by the next norm.

y is [M, D], or the partial sums [S, M, D] of a split product. One program per row; further programs prefetch weights.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op
from engines.kernels.text.prefetch import prefetch, share

_FETCHERS = 96  # programs that prefetch, on processors without a row


@triton.jit
def _gemma_norm(
    y, x, post, pre, x_new, h, ahead, lines, M, D, eps,
    PARTS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, FETCHERS: tl.constexpr,
):  # fmt: skip
    if STEP > 0:  # noqa: SIM102  # the first is known at compile time
        if tl.program_id(0) >= M:
            prefetch(ahead, lines, tl.program_id(0) - M, FETCHERS, STEP)
            return
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BD)
    keep = cols < D
    at = row * D + cols
    total = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(y + at + part * M * D, mask=keep, other=0.0).to(tl.float32)
        added *= tl.rsqrt(tl.sum(added * added, 0) / D + eps)
        total += added * tl.load(post + cols, mask=keep, other=0.0)
        rounded = total.to(x_new.dtype.element_ty)
        tl.store(x_new + at, rounded, mask=keep)
        total = rounded.to(tl.float32)
    total *= tl.rsqrt(tl.sum(total * total, 0) / D + eps)
    total *= tl.load(pre + cols, mask=keep, other=0.0)
    tl.store(h + at, total.to(h.dtype.element_ty), mask=keep)


def run(launch: Launcher, x: Tensor, pre: Tensor, eps: float) -> Tensor:
    rows, width = x.shape
    h = torch.empty_like(x)
    wide = triton.next_power_of_2(width)
    launch(
        _gemma_norm, (rows,), x, x, pre, pre, x, h, x, 0, rows, width, eps,
        PARTS=0, BD=wide, STEP=0, FETCHERS=0, num_warps=8 if wide >= 2048 else 4,
    )  # fmt: skip
    return h


def reference(x: Tensor, pre: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x²) + eps) * pre; pre [D] fp32 is 1 + weight."""
    return F.rms_norm(x.float(), pre.shape, pre, eps).to(x.dtype)


def run_sandwich(
    launch: Launcher, y: Tensor, x: Tensor, post: Tensor, pre: Tensor, eps: float, ahead: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    x_new, h = torch.empty_like(x), torch.empty_like(x)
    wide = triton.next_power_of_2(width)
    lines, step = share(launch, ahead)
    launch(
        _gemma_norm, (rows + _FETCHERS if step else rows,),
        y, x, post, pre, x_new, h, x if ahead is None else ahead, lines, rows, width, eps,
        PARTS=y.shape[0] if y.dim() == 3 else 1, BD=wide, STEP=step, FETCHERS=_FETCHERS,
        num_warps=8 if wide >= 2048 else 4,
    )  # fmt: skip
    return x_new, h


def reference_sandwich(
    y: Tensor, x: Tensor, post: Tensor, pre: Tensor, eps: float, _ahead: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns x_new = x + norm(y) * post in x's type, and norm(x_new) * pre; post, pre [D] fp32 are 1 + weight."""
    added = y.float().sum(0) if y.dim() == 3 else y.float()
    x_new = (x.float() + F.rms_norm(added, post.shape, post, eps)).to(x.dtype)
    return x_new, reference(x_new, pre, eps)


GEMMA_NORM = Op("gemma_norm", run, reference)
SANDWICH_NORM = Op("sandwich_norm", run_sandwich, reference_sandwich)
