"""Tiles of the products of shifted matrices: their sizes, loads and halves."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tile:
    """Rows, depth and columns of a product's tile, with warps and pipeline stages of its program."""

    rows: int
    depth: int
    columns: int
    warps: int
    stages: int


def tile_for(channels: int, columns: int, fp8: bool, whole: bool, tma: bool) -> Tile:
    """Returns the tile for C input and N output channels; whole: a tile spans all N, for a norm over them.

    With descriptors (tma), tiles are those measured on an H100 (bench/LOG.md): 256x128 for 128 channels, 128x256 for
    more, with deeper steps in 8 bits. With pointers they fit sm_89's 100 KB of shared memory.
    """
    depth = min(128 if fp8 else 64, channels & -channels)
    wide = columns if whole else min(256, columns & -columns)
    if not tma:
        return Tile(64 if wide == 256 else 128, min(depth, 64 if fp8 else 32), wide, 8 if wide >= 128 else 4, 3)
    if wide == 256:
        return Tile(128, depth, wide, 8, 3)
    return Tile(256, depth, wide, 8, 3 if fp8 else 4) if wide == 128 else Tile(128, depth, wide, 4, 3)


@triton.jit
def tile_at(x, row, column, ROWS, COLUMNS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Loads a tile of a matrix [ROWS, COLUMNS]; rows outside are zero."""
    if TMA:
        tile = x.load([row, column])
    else:
        r = row + tl.arange(0, BM)
        c = column + tl.arange(0, BK)
        at = r[:, None].to(tl.int64) * COLUMNS + c[None, :]
        tile = tl.load(x + at, mask=((r >= 0) & (r < ROWS))[:, None], other=0.0)
    return tile


@triton.jit
def inside(rows, P, HP, WP):
    """Returns the mask of rows of a zero-bordered matrix that are pixels."""
    column = rows % WP
    line = (rows // WP) % HP
    return (column > 0) & (column < WP - 1) & (line > 0) & (line < HP - 1) & (rows < P)


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Splits [BM, BN] into left and right half, because a whole tile's pointers do not fit into registers."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


def matrix(t: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Returns what `tile_at` reads: a descriptor of tiles with tma, else the tensor."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns]) if tma else t
