"""Depthwise 5x5 over NHWC: x [B*H*W, C], taps [25, C] -> [B*H*W, C]; the second scale of the decoder's attention.

As in engines.kernels.gated_depthwise, a program takes 8 columns of 64 channels and computes R rows of output. The 25
weights of four channels stay in a thread's registers, and each input row is read once for the five rows it affects.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.autoencoder.padded import Grid
from engines.kernels.op import Launcher, Op

SIDE = 5
_ROWS, _COLUMNS, _CHANNELS = 8, 8, 64


@triton.jit
def _taps(at, C: tl.constexpr, real):
    """Loads the five weights of a kernel row, each [1, BC]."""
    a = tl.load(at, mask=real, other=0.0).to(tl.float32)[None, :]
    b = tl.load(at + C, mask=real, other=0.0).to(tl.float32)[None, :]
    c = tl.load(at + 2 * C, mask=real, other=0.0).to(tl.float32)[None, :]
    d = tl.load(at + 3 * C, mask=real, other=0.0).to(tl.float32)[None, :]
    return a, b, c, d, tl.load(at + 4 * C, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _pixel(at, col, shift: tl.constexpr, W, C: tl.constexpr, within, both):
    keep = (within & (col + shift >= 0) & (col + shift < W))[:, None] & both
    return tl.load(at + shift * C, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _added(to, p, t):
    return to + p[0] * t[0] + p[1] * t[1] + p[2] * t[2] + p[3] * t[3] + p[4] * t[4]


@triton.jit
def _depthwise(x, taps, out, H, W, C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """Grid: (channel blocks, tiles of one image's pixels, B)."""
    across = tl.cdiv(W, BW)
    top = (tl.program_id(1) // across) * R
    col = (tl.program_id(1) % across) * BW + tl.arange(0, BW)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    real = ch < C
    both = real[None, :]
    t0, t1, t2, t3, t4 = (
        _taps(taps + ch, C, real),
        _taps(taps + 5 * C + ch, C, real),
        _taps(taps + 10 * C + ch, C, real),
        _taps(taps + 15 * C + ch, C, real),
        _taps(taps + 20 * C + ch, C, real),
    )
    nothing = tl.zeros((BW, BC), tl.float32)
    a, b, c, d, e = (
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )  # sums of the rows from two above to two below the row read
    first = (tl.program_id(2).to(tl.int64) * H + top) * W
    for step in tl.static_range(R + 4):
        row = top + (step - 2)
        within = (row >= 0) & (row < H)
        at = x + (first + (step - 2) * W + col)[:, None] * C + ch[None, :]
        p = (
            _pixel(at, col, -2, W, C, within, both),
            _pixel(at, col, -1, W, C, within, both),
            _pixel(at, col, 0, W, C, within, both),
            _pixel(at, col, 1, W, C, within, both),
            _pixel(at, col, 2, W, C, within, both),
        )
        a, b, c, d, e = _added(a, p, t4), _added(b, p, t3), _added(c, p, t2), _added(d, p, t1), _added(e, p, t0)
        if step >= 4:
            to = out + (first + (step - 4) * W + col)[:, None] * C + ch[None, :]
            tl.store(to, a.to(out.dtype.element_ty), mask=((row - 2 < H) & (col < W))[:, None] & both)
        a, b, c, d, e = b, c, d, e, nothing


def run(launch: Launcher, x: Tensor, taps: Tensor, grid: Grid) -> Tensor:
    out = torch.empty_like(x)
    channels = x.shape[1]
    tiles = triton.cdiv(grid.height, _ROWS) * triton.cdiv(grid.width, _COLUMNS)
    blocks = (triton.cdiv(channels, _CHANNELS), tiles, grid.batch)
    launch(
        _depthwise, blocks, x, taps, out, grid.height, grid.width, C=channels, R=_ROWS, BW=_COLUMNS, BC=_CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return out


def reference(x: Tensor, taps: Tensor, grid: Grid) -> Tensor:
    channels = x.shape[1]
    image = x.float().view(*grid, channels).permute(0, 3, 1, 2)
    kernel = taps.float().t().reshape(channels, 1, SIDE, SIDE)
    deep = F.conv2d(image, kernel, padding=SIDE // 2, groups=channels)
    return deep.permute(0, 2, 3, 1).reshape(x.shape).to(x.dtype)


DEPTHWISE = Op("depthwise", run, reference)
