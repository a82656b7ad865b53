"""Matrix product with bias and SiLU fused: x [M, K], weight [N, K], bias [N] -> silu(x @ weight.T + bias) [M, N].

Operands in e4m3 come with a scale each (fp32 []), and the result is bf16. Programs take output tiles in an
order that keeps GROUP rows of tiles in the L2 cache. They load operands by tensor descriptors if the card supports
them, else by pointers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engines.kernels.activations import silu
from engines.kernels.e4m3 import FP8
from engines.kernels.op import Launcher, Op


class Tile(NamedTuple):
    """Output tile of rows x cols with steps of `depth`, and warps and stages of its program.

    persistent: each processor's program takes several tiles and loads the next one while it writes. Otherwise each tile
    has its own program.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    persistent: bool


# On 132 processors, 1024 x 5760 in tiles of 128 x 256 takes 1.4 waves (two, 70 % full). Tiles of 128 x 128 take 2.7
# (91 %), and two programs on a processor (98 KB of shared memory each) overlap their ends. With many waves the large
# tile wins, because it reads a quarter less.
_LARGE = Tile(128, 256, 64, 8, 3, True)
_SMALL = Tile(128, 128, 64, 4, 3, False)
_POINTERS = Tile(128, 128, 32, 8, 4, False)  # sm_89: 100 KB of shared memory
_FP32 = Tile(32, 32, 32, 4, 2, True)
_FULL_WAVES = 3.5
_GROUP = 8


@triton.jit
def _tile(
    x, weight, bias, out, x_scale, weight_scale, tile, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    group = tile // (GROUP * tiles_n)
    tall = tl.minimum(tiles_m - group * GROUP, GROUP)
    m0 = (group * GROUP + (tile % (GROUP * tiles_n)) % tall) * BM
    n0 = ((tile % (GROUP * tiles_n)) // tall) * BN
    rows = m0 + tl.arange(0, BM)
    cols = n0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m0, k]), weight.load([n0, k]).T, acc, input_precision=PRECISION)
    else:
        depth = tl.arange(0, BK)
        at = x + rows.to(tl.int64)[:, None] * K + depth[None, :]
        by = weight + cols.to(tl.int64)[None, :] * K + depth[:, None]
        for k in range(0, K, BK):
            left = tl.load(at + k, mask=(rows < M)[:, None] & (k + depth < K)[None, :], other=0.0)
            right = tl.load(by + k, mask=(cols < N)[None, :] & (k + depth < K)[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if SCALED:
        acc *= tl.load(x_scale) * tl.load(weight_scale)
    acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = silu(acc)
    if TMA:
        out.store([m0, n0], acc.to(out.dtype))
    else:
        to = out + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _silu_product(
    x, weight, bias, out, x_scale, weight_scale, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    SCALED: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes output tiles. TMA: x, weight and out are tensor descriptors, else pointers."""
    if PERSISTENT:
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(x, weight, bias, out, x_scale, weight_scale, tile, M, N, K, BM, BN, BK, GROUP, TMA, SCALED, PRECISION)
    else:
        tile = tl.program_id(0)
        _tile(x, weight, bias, out, x_scale, weight_scale, tile, M, N, K, BM, BN, BK, GROUP, TMA, SCALED, PRECISION)


def tile_for(rows: int, cols: int, processors: int, tma: bool, itemsize: int = 2) -> Tile:
    """Returns the tile for an output [rows, cols]; operands of 1 byte get steps twice as deep, of as many bytes."""
    waves = triton.cdiv(rows, _LARGE.rows) * triton.cdiv(cols, _LARGE.cols) / processors
    tile = _POINTERS if not tma else _LARGE if waves >= _FULL_WAVES else _SMALL
    return tile._replace(depth=tile.depth * 2) if itemsize == 1 else tile


def run(
    launch: Launcher, x: Tensor, weight: Tensor, bias: Tensor,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows, depth = x.shape
    cols = weight.shape[0]
    out = torch.empty((rows, cols), dtype=torch.bfloat16 if x.dtype == FP8 else x.dtype, device=x.device)
    aligned = depth * x.element_size() % 16 == 0 and cols * out.element_size() % 16 == 0
    tma = launch.tma and aligned and x.element_size() <= 2
    tile = tile_for(rows, cols, launch.processors, tma, x.element_size())
    if x.element_size() == 4:
        tile = _FP32
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    operands: tuple[object, ...] = (x, weight, bias, out)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.cols, tile.depth]),
            bias,
            TensorDescriptor.from_tensor(out, [tile.rows, tile.cols]),
        )
    launch(
        _silu_product, (min(tiles, launch.processors) if tile.persistent else tiles,), *operands,
        *(x if scale is None else scale for scale in (x_scale, weight_scale)), rows, cols, depth,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, GROUP=_GROUP, TMA=tma, SCALED=x_scale is not None,
        PERSISTENT=tile.persistent,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    """Returns silu(x @ weight.T + bias) in fp32, rounded once; operands in e4m3 count times their scales."""
    y = x.float() @ weight.float().T
    if x_scale is not None and weight_scale is not None:
        y *= x_scale * weight_scale
    return F.silu(y + bias.float()).to(torch.bfloat16 if x.dtype == FP8 else x.dtype)


SILU_PRODUCT = Op("silu_product", run, reference)
