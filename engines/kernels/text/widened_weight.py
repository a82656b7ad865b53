"""A weight in e4m3 [N, K] with a scale for each row (fp32 [N]) as a matrix in another type, for cuBLAS.

Scales are powers of two, so the result is exact in bf16. Traffic bounds the time: 1 byte read and 2 written a number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op

_ROWS, _COLS = 32, 256


@triton.jit
def _widened_weight(narrow, scale, out, N, K, BN: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    col = tl.program_id(1) * BK + tl.arange(0, BK)
    at = row.to(tl.int64)[:, None] * K + col[None, :]
    keep = (row < N)[:, None] & (col < K)[None, :]
    wide = tl.load(narrow + at, mask=keep, other=0.0).to(tl.float32) * tl.load(scale + row, mask=row < N)[:, None]
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=keep)


def run(launch: Launcher, narrow: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, inner = narrow.shape
    out = torch.empty(rows, inner, dtype=dtype, device=narrow.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(inner, _COLS))
    launch(_widened_weight, grid, narrow, scale, out, rows, inner, BN=_ROWS, BK=_COLS, num_warps=4)
    return out


def reference(narrow: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns narrow times the scales of its rows, in `dtype`."""
    return (narrow.float() * scale[:, None]).to(dtype)


WIDENED_WEIGHT = Op("widened_weight", run, reference)
