"""Products of few rows by large weights, x [M <= 64, K] and w [N, K]: partial sums [S, M, N] in fp32, or gated [M, N].

Reading w once bounds the time. So many small programs run: S parts of K by tiles of 64 rows of w. w is the tall operand
of the tensor cores. The next kernel (gemma_norm) sums the parts. S depends only on N and K.

w may be in e4m3 with a scale for each row (fp32 [N]): half the bytes to read. It becomes x's type in registers,
exactly, and x keeps its own precision.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op
from engines.kernels.text.gelu_gate import gelu_tanh
from engines.kernels.text.prefetch import prefetch, share

MAX_ROWS = 64
PROGRAMS = 264  # two per processor of an H100
_BN, _BK = 64, 128


@triton.jit
def _skinny_product(
    x, w, scale, out, ahead, lines, M, N, K, span,
    SCALED: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.arange(0, BM)
    tile = tl.arange(0, BN)
    WIDE: tl.constexpr = BN // 2 if GATED else BN
    if GATED:  # half of the tile's rows are of the gate, half of the values
        of_w = (tl.program_id(0) * WIDE + tile % WIDE) % N + tl.where(tile < WIDE, 0, N)
    else:
        of_w = (tl.program_id(0) * WIDE + tile) % N
    inner = tl.arange(0, BK)
    w_at = w + of_w[:, None].to(tl.int64) * K + inner[None, :]
    x_at = x + (row % M)[:, None] * K + inner[None, :]
    first = part * span
    sums = tl.zeros((BN, BM), tl.float32)
    for k in range(first, min(first + span, K), BK):
        if EVEN:
            w_tile = tl.load(w_at + k)
            x_tile = tl.load(x_at + k)
        else:
            w_tile = tl.load(w_at + k, mask=(inner < K - k)[None, :], other=0.0)
            x_tile = tl.load(x_at + k, mask=(inner < K - k)[None, :], other=0.0)
        sums = tl.dot(w_tile.to(x.dtype.element_ty), tl.trans(x_tile), sums, input_precision="ieee")
    if SCALED:
        sums *= tl.load(scale + of_w)[:, None]
    cols = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    at = (part.to(tl.int64) * M + row)[None, :] * N + cols[:, None]
    keep = (row < M)[None, :] & (cols < N)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, WIDE, BM)), (1, 2, 0)))
        sums = gelu_tanh(gate) * up
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=keep)
    if STEP > 0:
        prefetch(ahead, lines, tl.program_id(0), tl.num_programs(0), STEP)


def parts_of(width: int, inner: int) -> int:
    """Returns S for w [width, inner]: enough programs for the card, each with at least one tile of K."""
    return max(1, min(-(-PROGRAMS // -(-width // _BN)), -(-inner // _BK)))


def _launch(
    launch: Launcher, x: Tensor, w: Tensor, scale: Tensor | None, out: Tensor, parts: int, gated: bool,
    ahead: Tensor | None,
) -> None:  # fmt: skip
    rows, inner = x.shape
    width = out.shape[-1]
    lines, step = share(launch, ahead)
    tall = max(16, triton.next_power_of_2(rows))
    # 64 or 72 KB of shared memory: three programs a processor, so that 288 programs run at once.
    deep, stages = (_BK // 2, 4) if tall == 64 else (_BK, 3)
    grid = (triton.cdiv(width, _BN // 2 if gated else _BN), parts)
    launch(
        _skinny_product, grid, x, w, x if scale is None else scale, out, w if ahead is None else ahead, lines, rows,
        width, inner, _part(inner, parts), SCALED=scale is not None, GATED=gated,
        EVEN=inner % deep == 0, STEP=step, BM=tall, BN=_BN, BK=deep, num_warps=4, num_stages=stages,
    )  # fmt: skip


def _part(inner: int, parts: int) -> int:
    """Returns the length of a part of K, a multiple of the tile."""
    return -(-inner // (_BK * parts)) * _BK


def run(launch: Launcher, x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    parts = parts_of(*w.shape)
    out = torch.empty(parts, x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    _launch(launch, x, w, scale, out, parts, False, None)
    return out


def reference(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns x w^T in fp32 as partial sums over S parts of K (the last ones shorter, or empty): [S, M, N]."""
    parts = parts_of(*w.shape)
    part = _part(x.shape[1], parts)
    sums = [x[:, at : at + part].float() @ w[:, at : at + part].float().T for at in range(0, parts * part, part)]
    return torch.stack(sums) if scale is None else torch.stack(sums) * scale


def run_gated(launch: Launcher, x: Tensor, w: Tensor, ahead: Tensor | None, scale: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape[0], w.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(launch, x, w, scale, out, 1, True, ahead)
    return out


def reference_gated(x: Tensor, w: Tensor, _ahead: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Returns gelu_tanh(x w1^T) * (x w2^T) in fp32, rounded once; w [2N, K] is w1 above w2, scale of its rows."""
    y = x.float() @ w.float().T
    gate, up = (y if scale is None else y * scale).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


SKINNY_PRODUCT = Op("skinny_product", run, reference)
GATED_PRODUCT = Op("gated_product", run_gated, reference_gated)
