"""RMSNorm over channels with weight, bias and residual, from plain or zero-bordered NHWC to either, optionally in e4m3.

y, residual [M, C] with M = grid.pixels or grid.padded; borders are written as zeros.
"""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.autoencoder.padded import Grid, image_of, pad
from engines.kernels.autoencoder.tiles import inside
from engines.kernels.e4m3 import FP8, as_fp8, quantised
from engines.kernels.op import Launcher, Op

Layout = Literal["plain", "bordered", "to bordered"]


@triton.jit
def _rms_norm(
    y, gain, bias, residual, out, out8, M, H, W, eps, per_scale, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BORDERED: tl.constexpr, ADD_BORDER: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    some = cols < C
    source = rows
    keep = rows < M
    if BORDERED:
        keep = inside(rows, M, H + 2, W + 2)
        if ADD_BORDER:
            image = rows // ((H + 2) * (W + 2))
            source = (image * H + (rows // (W + 2)) % (H + 2) - 1) * W + rows % (W + 2) - 1
    read = keep[:, None] & some[None, :]
    from_ = source[:, None].to(tl.int64) * C + cols[None, :]
    x = tl.load(y + from_, mask=read, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    x = x * tl.load(gain + cols, mask=some, other=0.0)[None, :] + tl.load(bias + cols, mask=some, other=0.0)[None, :]
    x += tl.load(residual + from_, mask=read, other=0.0).to(tl.float32)
    x = tl.where(keep[:, None], x, 0.0)
    at = rows[:, None].to(tl.int64) * C + cols[None, :]
    write = (rows < M)[:, None] & some[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=write)
    if SECOND:
        tl.store(out8 + at, as_fp8(x, per_scale).to(out8.dtype.element_ty), mask=write)


def run(
    launch: Launcher, y: Tensor, gain: Tensor, bias: Tensor, residual: Tensor, eps: float, layout: Layout,
    out_scale: float | None, grid: Grid,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = grid.pixels if layout == "plain" else grid.padded
    channels = y.shape[1]
    out = torch.empty(rows, channels, dtype=residual.dtype, device=y.device)
    second = None if out_scale is None else torch.empty(rows, channels, dtype=FP8, device=y.device)
    wide = triton.next_power_of_2(channels)
    tall = max(1, min(16, 4096 // wide))
    launch(
        _rms_norm, (triton.cdiv(rows, tall),), y, gain, bias, residual, out, out if second is None else second, rows,
        grid.height, grid.width, eps, 1.0 if out_scale is None else 1 / out_scale, C=channels, BM=tall, BC=wide,
        BORDERED=layout != "plain", ADD_BORDER=layout == "to bordered", SECOND=second is not None, num_warps=4,
    )  # fmt: skip
    return (out,) if second is None else (out, second)


def reference(
    y: Tensor, gain: Tensor, bias: Tensor, residual: Tensor, eps: float, layout: Layout, out_scale: float | None,
    grid: Grid,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns residual + bias + gain * y / sqrt(mean(y²) + eps), in fp32, rounded once."""
    x = y.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain + bias + residual.float()
    if layout == "bordered":
        x = pad(image_of(x, grid))
    elif layout == "to bordered":
        x = F.pad(x.view(*grid, x.shape[1]), (0, 0, 1, 1, 1, 1)).flatten(0, 2)
    wide = x.to(residual.dtype)
    return (wide,) if out_scale is None else (wide, quantised(x, out_scale))


RMS_NORM = Op("rms_norm", run, reference)
