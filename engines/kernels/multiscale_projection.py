"""The second scale of the decoder's attention: depthwise KxK, then a 1x1 convolution in groups of G, in one kernel.

x [B*H*W, C] NHWC, taps [K*K, C], weight [C/G, G, G] (group, out, in), G 32 or less, or 64 -> [B*H*W, C].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op
from engines.kernels.padded import Grid


@triton.jit
def _mixed(acc, w, out, line, cols, channel, some, H, W, C: tl.constexpr):
    """Writes one line of pixels through its groups' product."""
    mixed = tl.dot(acc.to(w.dtype), w, input_precision="ieee")
    at = (line * W + cols)[:, None].to(tl.int64) * C + channel[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=((cols < W) & (line % H >= 0))[:, None] & some[None, :])


@triton.jit
def _multiscale_projection(
    x, taps, weight, out, H, W, C: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BW: tl.constexpr, BG: tl.constexpr
):
    """Two lines, which share K - 1 of the K + 1 that they read; BG channels, of one group or of several whole ones."""
    lines = tl.cdiv(H, 2)
    image = tl.program_id(0) // lines
    h = 2 * (tl.program_id(0) % lines)
    line = image * H + h
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    lane = tl.arange(0, BG)
    whole: tl.constexpr = BG // G * G if BG >= G else BG  # channels of a program, the rest of a tile is idle
    channel = tl.program_id(2) * whole + lane
    some = (lane < whole) & (channel < C)
    upper = tl.zeros((BW, BG), tl.float32)
    lower = tl.zeros((BW, BG), tl.float32)
    for dy in tl.static_range(K + 1):
        hh = h + dy - K // 2
        for dx in tl.static_range(K):
            ww = cols + dx - K // 2
            keep = ((hh >= 0) & (hh < H) & (ww >= 0) & (ww < W))[:, None] & some[None, :]
            at = ((line + dy - K // 2) * W + ww)[:, None] * C + channel[None, :]
            seen = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
            if dy < K:
                tap = tl.load(taps + (dy * K + dx) * C + channel, mask=some, other=0.0).to(tl.float32)
                upper += seen * tap[None, :]
            if dy > 0:
                tap = tl.load(taps + ((dy - 1) * K + dx) * C + channel, mask=some, other=0.0).to(tl.float32)
                lower += seen * tap[None, :]
    together = (channel[:, None] // G == channel[None, :] // G) & some[:, None] & some[None, :]
    at = channel[None, :] * G + (channel % G)[:, None]  # [in, out]
    w = tl.load(weight + at, mask=together, other=0.0)
    _mixed(upper, w, out, line, cols, channel, some, H, W, C)
    if h + 1 < H:
        _mixed(lower, w, out, line + 1, cols, channel, some, H, W, C)


def run(launch: Launcher, x: Tensor, taps: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    out = torch.empty_like(x)
    group = weight.shape[1]
    channels = x.shape[1]
    wide = min(32, max(16, triton.next_power_of_2(grid.width)))
    lanes = max(64 if 64 % group == 0 else 16, triton.next_power_of_2(group))
    blocks = (
        grid.batch * triton.cdiv(grid.height, 2),
        triton.cdiv(grid.width, wide),
        triton.cdiv(channels, lanes // group * group),
    )
    launch(
        _multiscale_projection,
        blocks,
        x,
        taps,
        weight,
        out,
        grid.height,
        grid.width,
        C=channels,
        G=group,
        K=round(taps.shape[0] ** 0.5),
        BW=wide,
        BG=lanes,
        num_warps=4,
    )
    return out


def reference(x: Tensor, taps: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    channels, side = x.shape[1], round(taps.shape[0] ** 0.5)
    image = x.float().view(*grid, channels).permute(0, 3, 1, 2)
    kernel = taps.float().t().reshape(channels, 1, side, side)
    deep = F.conv2d(image, kernel, padding=side // 2, groups=channels)
    groups, group = weight.shape[:2]
    mixed = F.conv2d(deep, weight.float().reshape(channels, group, 1, 1), groups=groups)
    return mixed.permute(0, 2, 3, 1).reshape(x.shape).to(x.dtype)


MULTISCALE_PROJECTION = Op("multiscale_projection", run, reference)
