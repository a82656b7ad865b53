"""ReLU linear attention as two kernels, context (split over tokens) and apply: [B*N, 3D] -> [B*N, D].

Both forms compute out = (relu(q) @ ctx) / (relu(q) . ksum + 1e-15) per image and head, where ctx is the sum over tokens
of relu(k) (x) v, and ksum that of relu(k):

- the transformer's: q, k, v are the thirds of a row. k is first divided by the rms of its whole row and multiplied by
  norm weights. q's rms cancels in the quotient; its weight is folded into the projection.
- the decoder's: a row is a sequence of (q, k, v) of 3d, in two tensors; those of the second are first multiplied by a
  matrix [d, d] each, a grouped 1x1 convolution.

The order in which the parts' contexts are added depends only on N, so an image does not depend on its batch.
Shapes: B images, N tokens, H heads of d, D = H*d, S parts of the tokens, P = d padded to 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op

EPS = 1e-15
_CONTEXTS_PER_LOAD = 8


@triton.jit
def _row_rms(x, out, ROW, OFFSET, D, eps, BC: tl.constexpr):
    """Writes out[row] = 1 / rms of D values, from OFFSET on in a row of ROW."""
    row = tl.program_id(0)
    cols = tl.arange(0, BC)
    part = tl.load(x + row.to(tl.int64) * ROW + OFFSET + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out + row, tl.rsqrt(tl.sum(part * part, 0) / D + eps))


@triton.jit
def _mixing(mix, local, part, HD: tl.constexpr, HP: tl.constexpr, MIXED: tl.constexpr):
    """Loads the matrix [in, out] of a head's q (0), k (1) or v (2); zeros if not MIXED."""
    d = tl.arange(0, HP)
    square = tl.zeros((HP, HP), tl.float32)
    if MIXED:
        keep = (d < HD)[:, None] & (d < HD)[None, :]
        group = (3 * local + part) * HD * HD
        square = tl.load(mix + group + d[None, :] * HD + d[:, None], mask=keep, other=0.0).to(tl.float32)
    return square


@triton.jit
def _context(
    first, second, mix, rms, weight, ctx, N, ROW, SPLIT, STEP, PART, CHUNK,
    HD: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr,
    NORMED: tl.constexpr, MIXED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ctx [B, H, S, HP + 1, HP] fp32: each part's context [k, v], with the sum of k in the last row."""
    head, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, parts = tl.num_programs(0), tl.num_programs(1)
    source, local = first, head
    if head >= SPLIT:
        source, local = second, head - SPLIT
    d = tl.arange(0, HP)
    keep = d < HD
    kind = first.dtype.element_ty if FAST else tl.float32
    total = tl.zeros((HP,), tl.float32)
    acc = tl.zeros((HP, HP), tl.float32)
    scale = tl.full((HP,), 1.0, tl.float32)
    if NORMED:
        scale = tl.load(weight + head * HD + d, mask=keep, other=0.0).to(tl.float32)
    mix_k, mix_v = _mixing(mix, local, 1, HD, HP, MIXED), _mixing(mix, local, 2, HD, HP, MIXED)
    for start in range(0, CHUNK, BN):
        n = part * CHUNK + start + tl.arange(0, BN)
        inside = n < tl.minimum(N, (part + 1) * CHUNK)
        row = image.to(tl.int64) * N + n
        at = source + row[:, None] * ROW + local * STEP + d[None, :]
        mask = inside[:, None] & keep[None, :]
        k = tl.load(at + PART, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(at + 2 * PART, mask=mask, other=0.0).to(kind)
        if MIXED:  # noqa: SIM102  # the first is known at compile time, the second at run time
            if head >= SPLIT:
                k = tl.dot(k.to(kind), mix_k.to(kind), input_precision=PRECISION)
                v = tl.dot(v, mix_v.to(kind), input_precision=PRECISION).to(kind)
        if NORMED:
            k = k * scale[None, :] * tl.load(rms + row, mask=inside, other=0.0)[:, None]
        k = tl.maximum(k, 0.0)
        total += tl.sum(k, 0)
        acc = tl.dot(tl.trans(k.to(kind)), v, acc, input_precision=PRECISION)
    to = ctx + ((image * heads + head) * parts + part).to(tl.int64) * (HP + 1) * HP
    tl.store(to + d[:, None] * HP + d[None, :], acc)
    tl.store(to + HP * HP + d, total)


@triton.jit
def _apply(
    first, second, mix, ctx, out, N, ROW, SPLIT, STEP, PARTS, CHUNK,
    HD: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    MIXED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out [B*N, H*HD] from the parts' contexts; a program takes CHUNK tokens of one head."""
    head, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    source, local = first, head
    if head >= SPLIT:
        source, local = second, head - SPLIT
    d, s = tl.arange(0, HP), tl.arange(0, BS)
    kind = first.dtype.element_ty if FAST else tl.float32
    row, last = image.to(tl.int64) * N, tl.minimum(N, (part + 1) * CHUNK)
    n = part * CHUNK + tl.arange(0, BN)
    at_query = source + (row + n)[:, None] * ROW + local * STEP + d[None, :]
    q = tl.load(
        at_query, mask=(n < last)[:, None] & (d < HD)[None, :], other=0.0
    )  # loads start before those of the contexts
    context = tl.zeros((HP, HP), tl.float32)
    total = tl.zeros((HP,), tl.float32)
    of_head = ctx + ((image * heads + head) * PARTS).to(tl.int64) * (HP + 1) * HP
    for begin in range(0, PARTS, BS):
        here = begin + s
        at = of_head + here[:, None] * ((HP + 1) * HP)
        total += tl.sum(tl.load(at + HP * HP + d[None, :], mask=here[:, None] < PARTS, other=0.0), 0)
        square = at[:, :, None] + d[None, :, None] * HP + d[None, None, :]
        context += tl.sum(tl.load(square, mask=here[:, None, None] < PARTS, other=0.0), 0)
    context = context.to(kind)
    mix_q = _mixing(mix, local, 0, HD, HP, MIXED)
    for _ in range(0, CHUNK, BN):
        wide = q.to(tl.float32)
        if MIXED:  # noqa: SIM102  # as above
            if head >= SPLIT:
                wide = tl.dot(q.to(kind), mix_q.to(kind), input_precision=PRECISION)
        wide = tl.maximum(wide, 0.0)
        mask = (n < last)[:, None] & (d < HD)[None, :]
        to = out + (row + n)[:, None] * (heads * HD) + head * HD + d[None, :]
        n += BN
        at_query += BN * ROW
        q = tl.load(at_query, mask=(n < last)[:, None] & (d < HD)[None, :], other=0.0)  # for the next step
        y = tl.dot(wide.to(kind), context, input_precision=PRECISION)
        y = y / (tl.sum(wide * total[None, :], 1) + 1e-15)[:, None]
        tl.store(to, y.to(out.dtype.element_ty), mask=mask)


def _chunk(tokens: int) -> int:
    """Returns the tokens per part, from the image's size alone, so that sums do not depend on the batch."""
    return 128 if tokens <= 1024 else 512 if tokens <= 8192 else 1024


def _attend(
    launch: Launcher, first: Tensor, second: Tensor, mix: Tensor | None, rms: Tensor | None, weight: Tensor | None,
    batch: int, heads: int, split: int, head_dim: int, step: int, part: int,
) -> Tensor:  # fmt: skip
    """Runs both kernels. Heads below `split` are in `first`, the others in `second`, whose q, k, v `mix` multiplies.

    step: distance from head to head; part: from q to k to v.
    """
    rows, width = first.shape
    tokens = rows // batch
    padded = max(16, triton.next_power_of_2(head_dim))
    chunk = _chunk(tokens)
    parts = triton.cdiv(tokens, chunk)
    fast = first.dtype == torch.bfloat16  # fp16 would not hold the context
    precision = "ieee" if first.dtype == torch.float32 else "tf32"
    ctx = torch.empty((batch, heads, parts, padded + 1, padded), dtype=torch.float32, device=first.device)
    out = torch.empty((rows, heads * head_dim), dtype=first.dtype, device=first.device)
    grid = (heads, parts, batch)
    norm_operands = first if rms is None else rms, first if weight is None else weight
    second_mix = first if mix is None else mix
    launch(
        _context, grid, first, second, second_mix, *norm_operands, ctx, tokens, width, split, step, part, chunk,
        HD=head_dim, HP=padded, BN=128, NORMED=rms is not None, MIXED=mix is not None, FAST=fast,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip
    launch(
        _apply, grid, first, second, second_mix, ctx, out, tokens, width, split, step, parts, chunk,
        HD=head_dim, HP=padded, BN=128, BS=_CONTEXTS_PER_LOAD, MIXED=mix is not None, FAST=fast,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return out


def run_linear(launch: Launcher, qkv: Tensor, weight: Tensor | None, batch: int, head_dim: int, eps: float) -> Tensor:
    rows, width = qkv.shape
    dim = width // 3
    rms = None
    if weight is not None:
        rms = torch.empty(rows, dtype=torch.float32, device=qkv.device)
        wide = triton.next_power_of_2(dim)
        launch(_row_rms, (rows,), qkv, rms, width, dim, dim, eps, BC=wide, num_warps=2 if wide <= 2048 else 4)
    heads = dim // head_dim
    return _attend(launch, qkv, qkv, None, rms, weight, batch, heads, heads, head_dim, head_dim, dim)


def reference_linear(qkv: Tensor, weight: Tensor | None, batch: int, head_dim: int, eps: float) -> Tensor:
    """Maps qkv [B*N, 3D] to [B*N, D] in fp32, rounded once; weight [D]: k's RMSNorm over all heads, or None."""
    q, k, v = qkv.float().chunk(3, 1)
    if weight is not None:
        k = k * torch.rsqrt(k.square().mean(1, keepdim=True) + eps) * weight.float()
    q, k, v = (part.reshape(batch, -1, part.shape[1] // head_dim, head_dim).transpose(1, 2) for part in (q, k, v))
    return _quotient(q.relu(), k.relu(), v).transpose(1, 2).reshape(qkv.shape[0], -1).to(qkv.dtype)


def _quotient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention of [B, H, N, d]; q and k are after ReLU."""
    weight = (k.sum(2, keepdim=True) @ q.transpose(2, 3)).transpose(2, 3)  # [B, H, N, 1]
    return (q @ (k.transpose(2, 3) @ v)) / (weight + EPS)


def run_multiscale(launch: Launcher, qkv: Tensor, deep: Tensor, mix: Tensor, batch: int, head_dim: int) -> Tensor:
    rows, width = qkv.shape
    if rows // batch <= head_dim:
        return reference_multiscale(qkv, deep, mix, batch, head_dim)
    groups = width // (3 * head_dim)
    return _attend(launch, qkv, deep, mix, None, None, batch, 2 * groups, groups, head_dim, 3 * head_dim, head_dim)


def reference_multiscale(qkv: Tensor, deep: Tensor, mix: Tensor, batch: int, head_dim: int) -> Tensor:
    """Maps qkv and deep [B*N, 3C] to [B*N, 2C] in fp32, with groups and order of `attend` in engines.models.dcae.

    deep: output of the depthwise convolution; mix [3C/d, d, d] (group, out, in): the grouped 1x1 convolution after it.
    """
    grouped = deep.float().view(deep.shape[0], -1, head_dim)
    scaled = torch.einsum("ngi,goi->ngo", grouped, mix.float()).flatten(1).to(deep.dtype)
    both = torch.cat([qkv, scaled], 1).float().reshape(batch, -1, 2 * qkv.shape[1] // (3 * head_dim), 3, head_dim)
    q, k, v = both.permute(3, 0, 2, 1, 4)  # [B, groups, N, d]
    q, k = q.relu(), k.relu()
    if both.shape[1] > head_dim:
        out = _quotient(q, k, v)
    else:
        scores = q @ k.transpose(2, 3)
        out = (scores / (scores.sum(3, keepdim=True) + EPS)) @ v
    return out.transpose(1, 2).reshape(qkv.shape[0], -1).to(qkv.dtype)


LINEAR_ATTENTION = Op("linear_attention", run_linear, reference_linear)
MULTISCALE_ATTENTION = Op("multiscale_attention", run_multiscale, reference_multiscale)
