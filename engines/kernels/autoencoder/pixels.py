"""Sums the last convolution's nine taps [27, P] per pixel (CONVOLUTION_TAPS), adds the bias, converts to uint8 RGB.

Returns pixels [B, H, W, 3] and the count of numbers per image that are not finite, int32 [B].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.autoencoder.padded import Grid
from engines.kernels.op import Launcher, Op

_PIXELS_PER_PROGRAM = 512


@triton.jit
def _pixels(taps, bias, out, broken, P, H, W, BW: tl.constexpr):
    image = tl.program_id(1)
    at = tl.program_id(0) * BW + tl.arange(0, BW)
    keep = at < H * W
    row = (image * (H + 2) + at // W + 1) * (W + 2) + at % W + 1
    unsound = tl.zeros((BW,), tl.int32)
    for channel in tl.static_range(3):
        total = tl.zeros((BW,), tl.float32) + tl.load(bias + channel)
        for tap in tl.static_range(9):
            source = row + (tap // 3 - 1) * (W + 2) + tap % 3 - 1
            total += tl.load(taps + (tap * 3 + channel) * P.to(tl.int64) + source, mask=keep, other=0.0).to(tl.float32)
        sound = tl.abs(total) < float("inf")
        unsound += (keep & (sound == 0)).to(tl.int32)
        level = tl.where(sound, tl.minimum(tl.maximum(total * 127.5 + 127.5, 0.0), 255.0), 0.0)
        target = (image.to(tl.int64) * H * W + at) * 3 + channel
        tl.store(out + target, tl.floor(level + 0.5).to(tl.uint8), mask=keep)
    tl.atomic_add(broken + image, tl.sum(unsound, 0))


def run(launch: Launcher, taps: Tensor, bias: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    out = torch.empty(grid.batch, grid.height, grid.width, 3, dtype=torch.uint8, device=taps.device)
    broken = torch.zeros(grid.batch, dtype=torch.int32, device=taps.device)
    blocks = (triton.cdiv(grid.height * grid.width, _PIXELS_PER_PROGRAM), grid.batch)
    launch(
        _pixels, blocks, taps, bias, out, broken, taps.shape[1], grid.height, grid.width, BW=_PIXELS_PER_PROGRAM,
        num_warps=4,
    )  # fmt: skip
    return out, broken


def reference(taps: Tensor, bias: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    planes = taps.float().view(3, 3, 3, grid.batch, grid.height + 2, grid.width + 2)  # dy, dx, channel
    total = bias[:, None, None, None].float()
    for dy in range(3):
        for dx in range(3):
            total = total + planes[dy, dx, :, :, dy : dy + grid.height, dx : dx + grid.width]
    sound = total.isfinite()
    broken = (~sound).sum((0, 2, 3)).to(torch.int32)
    level = torch.where(sound, total * 127.5 + 127.5, 0.0).clamp(0, 255)
    return (level + 0.5).floor().to(torch.uint8).permute(1, 2, 3, 0).contiguous(), broken


PIXELS = Op("pixels", run, reference)
