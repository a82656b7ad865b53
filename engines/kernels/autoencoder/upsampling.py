"""Doubles a zero-bordered NHWC image by folded convolutions (engines.models.folding), one product per phase.

x [P, C] zero-bordered, weight [4*D, S*S*C] with k = tap*C + channel and rows by phase, bias [D]. Each pixel gives four,
at (2r + p//2, 2c + p%2). S = 2: folded nearest + 3x3; S = 3: 3x3 and pixel shuffle. Returns [.., D] zero-bordered, and
optionally also in e4m3; or plain NHWC [B*2H*2W, D].
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.autoencoder.border import write_border
from engines.kernels.autoencoder.padded import Grid, image_of, pad
from engines.kernels.autoencoder.tiles import halves, matrix, tile_at, tile_for
from engines.kernels.e4m3 import FP8, as_fp8, quantised
from engines.kernels.op import Launcher, Op


@triton.jit
def _write(y, acc, m0, n0, pixel, fits, D: tl.constexpr, BH: tl.constexpr, LINES: tl.constexpr):
    """Writes BH columns from n0 on; LINES: by a descriptor whose rows are pairs of pixels, else by pointers."""
    if LINES:
        y.store([m0, n0], acc.to(y.dtype))
    else:
        at = pixel[:, None] * D + (n0 % D + tl.arange(0, BH))[None, :]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=fits[:, None])


@triton.jit
def _upsampling(
    x, w, bias, y, y8, P, H, W, images, per_scale, C: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BORDERED: tl.constexpr, SECOND: tl.constexpr,
    TMA: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Computes tiles; each lies in one line of the image and in one phase."""
    across: tl.constexpr = 4 * D // BN
    steps: tl.constexpr = C // BK
    taps: tl.constexpr = SIDE * SIDE
    half: tl.constexpr = BN // 2
    along = tl.cdiv(W, BM)
    for tile in tl.range(tl.program_id(0), images * H * along * across, tl.num_programs(0)):
        n0 = (tile % across) * BN
        position = tile // across
        c0 = (position % along) * BM
        line = (position // along) % H
        image = position // (along * H)
        phase = n0 // D
        down = phase // 2
        right = phase % 2
        m0 = (image * (H + 2) + line) * (W + 2) + c0  # the pixel above and left of the tile's first
        if SIDE == 2:
            m0 += down * (W + 2) + right
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for t in range(taps * steps):
            tap = t // steps
            shift = (tap // SIDE) * (W + 2) + tap % SIDE
            a = tile_at(x, m0 + shift, (t % steps) * BK, P, C, BM, BK, TMA)
            b = tile_at(w, n0, t * BK, 4 * D, taps * C, BN, BK, TMA)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        acc += tl.load(bias + n0 % D + tl.arange(0, BN))[None, :]
        columns = c0 + tl.arange(0, BM)
        fits = columns < W
        if BORDERED:
            first = (image * (2 * H + 2) + 2 * line + down + 1) * (W + 1) + c0 + right  # of pairs of pixels
            pixel = 2 * (first - c0 - right + columns).to(tl.int64) + 1 + right
            left_at = (1 - right) * D + n0 % D
        else:
            first = (image * 2 * H + 2 * line + down) * W + c0
            pixel = 2 * (first - c0 + columns).to(tl.int64) + right
            left_at = right * D + n0 % D
        left, rest = halves(acc, BM, BN)
        _write(y, left, first, left_at, pixel, fits, D, half, LINES)
        _write(y, rest, first, left_at + half, pixel, fits, D, half, LINES)
        if SECOND:
            _write(y8, as_fp8(left, per_scale), first, left_at, pixel, fits, D, half, LINES)
            _write(y8, as_fp8(rest, per_scale), first, left_at + half, pixel, fits, D, half, LINES)


def run(
    launch: Launcher, x: Tensor, weight: Tensor, bias: Tensor, bordered: bool, out_scale: float | None, grid: Grid
) -> tuple[Tensor, ...]:
    channels, columns = x.shape[1], weight.shape[0] // 4
    tile = tile_for(channels, columns, False, False, launch.tma)
    if grid.width <= 64 and tile.rows > 64:
        tile = replace(tile, rows=64, warps=4)
    if out_scale is not None:
        tile = replace(tile, stages=3)  # room for the second output
    doubled = grid.doubled
    rows = doubled.padded if bordered else doubled.pixels
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    second = None if out_scale is None else torch.empty(rows, columns, dtype=FP8, device=x.device)
    lines = launch.tma and grid.width % tile.rows == 0
    per_scale = 1.0 if out_scale is None else 1 / out_scale

    def pairs(t: Tensor) -> Any:
        return matrix(t.view(rows // 2, 2 * columns), tile.rows, tile.columns // 2, lines) if lines else t

    tiles = grid.batch * grid.height * triton.cdiv(grid.width, tile.rows) * (4 * columns // tile.columns)
    launch(
        _upsampling, (min(launch.processors, tiles),), matrix(x, tile.rows, tile.depth, launch.tma),
        matrix(weight, tile.columns, tile.depth, launch.tma), bias, pairs(y), pairs(y if second is None else second),
        grid.padded, grid.height, grid.width, grid.batch, per_scale, C=channels, D=columns,
        SIDE=2 if weight.shape[1] == 4 * channels else 3, BM=tile.rows, BK=tile.depth, BN=tile.columns,
        BORDERED=bordered, SECOND=second is not None, TMA=launch.tma, LINES=lines, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if bordered:
        write_border(launch, y, second, doubled)
    return (y,) if second is None else (y, second)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, bordered: bool, out_scale: float | None, grid: Grid
) -> tuple[Tensor, ...]:
    side = 2 if weight.shape[1] == 4 * x.shape[1] else 3
    kernel: Any = weight.float().view(weight.shape[0], side, side, x.shape[1]).permute(0, 3, 1, 2)
    y = F.conv2d(image_of(x.float(), grid), kernel, bias.float().repeat(4), padding=1)
    shift = 1 if side == 2 else 0
    phases = [
        part[:, :, shift * (p // 2) :, shift * (p % 2) :][:, :, : grid.height, : grid.width]
        for p, part in enumerate(y.chunk(4, dim=1))
    ]
    doubled = F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)
    wide = pad(doubled) if bordered else doubled.permute(0, 2, 3, 1).reshape(-1, doubled.shape[1])
    output = wide.to(x.dtype).contiguous()
    return (output,) if out_scale is None else (output, quantised(wide, out_scale))


UPSAMPLING = Op("upsampling", run, reference)
