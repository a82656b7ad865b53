"""Depthwise 3x3 and gate of a GLUMBConv: x [B*H*W, 2C] after SiLU -> value * silu(gate) [B*H*W, C]; bias fused,
optionally in e4m3 as the product behind it reads it.

A program takes BW columns of BC channels of value and gate and computes R rows of output. The weights stay in
registers; each input row is loaded and converted once for the three output rows that it affects. With a tile of 8 x 64
and 4 warps a thread has four channels of one pixel, whose 72 weights and 24 sums fit its registers.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.activations import silu
from engines.kernels.e4m3 import FP8, as_fp8, per_scale, rounded
from engines.kernels.op import Launcher, Op

_ROWS = 8


@triton.jit
def _taps(at, STEP: tl.constexpr, real):
    left = tl.load(at, mask=real, other=0.0).to(tl.float32)[None, :]
    middle = tl.load(at + STEP, mask=real, other=0.0).to(tl.float32)[None, :]
    return left, middle, tl.load(at + 2 * STEP, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _pixels(at, STEP: tl.constexpr, left, middle, right):
    """Loads three neighbours in a row, each [BW, BC]; the masks say which are inside of the image."""
    first = tl.load(at - STEP, mask=left, other=0.0).to(tl.float32)
    second = tl.load(at, mask=middle, other=0.0).to(tl.float32)
    return first, second, tl.load(at + STEP, mask=right, other=0.0).to(tl.float32)


@triton.jit
def _added(to, pixels, taps):
    return to + pixels[0] * taps[0] + pixels[1] * taps[1] + pixels[2] * taps[2]


@triton.jit
def _gated_depthwise(
    x, taps, bias, out, H, W, per_scale, C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Grid: (channel blocks, tiles of one image's pixels, B)."""
    across = tl.cdiv(W, BW)
    top = (tl.program_id(1) // across) * R
    col = (tl.program_id(1) % across) * BW + tl.arange(0, BW)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    real = ch < C
    both = real[None, :]
    value_0, value_1, value_2 = (
        _taps(taps + ch, 2 * C, real),
        _taps(taps + 6 * C + ch, 2 * C, real),
        _taps(taps + 12 * C + ch, 2 * C, real),
    )
    gate_0, gate_1, gate_2 = (
        _taps(taps + C + ch, 2 * C, real),
        _taps(taps + 7 * C + ch, 2 * C, real),
        _taps(taps + 13 * C + ch, 2 * C, real),
    )
    nothing = tl.zeros((BW, BC), tl.float32)
    value_bias = nothing + tl.load(bias + ch, mask=real, other=0.0).to(tl.float32)[None, :]
    gate_bias = nothing + tl.load(bias + C + ch, mask=real, other=0.0).to(tl.float32)[None, :]
    value_a, value_b, value_c = (
        value_bias,
        value_bias,
        value_bias,
    )  # sums of the rows above, at and below the row loaded
    gate_a, gate_b, gate_c = gate_bias, gate_bias, gate_bias
    first = (tl.program_id(2).to(tl.int64) * H + top) * W
    for step in tl.static_range(R + 2):
        row = top + (step - 1)
        within = (row >= 0) & (row < H)
        at = x + (first + (step - 1) * W + col)[:, None] * (2 * C) + ch[None, :]
        left = (within & (col >= 1) & (col < W))[:, None] & both
        middle = (within & (col < W))[:, None] & both
        right = (within & (col + 1 < W))[:, None] & both
        values = _pixels(at, 2 * C, left, middle, right)
        gates = _pixels(at + C, 2 * C, left, middle, right)
        if step >= 2:
            value_a = _added(value_a, values, value_2)
            gate_a = _added(gate_a, gates, gate_2)
            y = value_a * silu(gate_a)
            if NARROW:
                y = as_fp8(y, per_scale)
            to = out + (first + (step - 2) * W + col)[:, None] * C + ch[None, :]
            tl.store(to, y.to(out.dtype.element_ty), mask=((col < W) & (row - 1 < H))[:, None] & both)
        if step >= 1 and step <= R:
            value_b = _added(value_b, values, value_1)
            gate_b = _added(gate_b, gates, gate_1)
        if step < R:
            value_c = _added(value_c, values, value_0)
            gate_c = _added(gate_c, gates, gate_0)
        value_a, value_b, value_c = value_b, value_c, value_bias
        gate_a, gate_b, gate_c = gate_b, gate_c, gate_bias


def run(
    launch: Launcher, x: Tensor, taps: Tensor, bias: Tensor, batch: int, height: int, width: int,
    out_scale: float | None = None,
) -> Tensor:  # fmt: skip
    channels = x.shape[1] // 2
    out = torch.empty((x.shape[0], channels), dtype=x.dtype if out_scale is None else FP8, device=x.device)
    tall, wide, block = min(_ROWS, height), 8, min(64, max(16, triton.next_power_of_2(channels)))
    tiles = triton.cdiv(height, tall) * triton.cdiv(width, wide)
    launch(
        _gated_depthwise, (triton.cdiv(channels, block), tiles, batch), x, taps, bias, out, height, width,
        per_scale(out_scale), C=channels, R=tall, BW=wide, BC=block, NARROW=out_scale is not None, num_warps=4,
    )  # fmt: skip
    return out


def reference(
    x: Tensor, taps: Tensor, bias: Tensor, batch: int, height: int, width: int, out_scale: float | None = None
) -> Tensor:
    """Returns the zero-padded depthwise convolution plus bias, its first C channels times SiLU of the others.

    x [B*H*W, 2C], taps [9, 2C] (row by row of the 3x3), bias [2C]. Computes in fp32 and rounds once; with out_scale,
    result / out_scale to e4m3.
    """
    channels = x.shape[1]
    grid = x.float().reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    weight = taps.float().t().reshape(channels, 1, 3, 3)
    y = F.conv2d(grid, weight, bias.float(), padding=1, groups=channels)
    value, gate = y.permute(0, 2, 3, 1).reshape(-1, channels).chunk(2, 1)
    return rounded(value * F.silu(gate), x, out_scale)


GATED_DEPTHWISE = Op("gated_depthwise", run, reference)
