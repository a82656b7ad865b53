"""Softmax attention of image tokens over text, with keys and values of all blocks in one matrix.

kv [B*T, L*2*D] holds, for each of L blocks, keys [D] and values [D]. KEY_NORM normalises all keys once per prompt:
RMSNorm over D, times the weights of both norms and d^-0.5. So the query's norm is one number per token, 1 / rms.
CROSS_ATTENTION reads only the first lengths[b] tokens of a text.

Shapes: B images, N image tokens, T text tokens, H heads of d, D = H*d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.e4m3 import FP8, as_fp8, per_scale, rounded
from engines.kernels.linear_attention import _row_rms
from engines.kernels.op import Launcher, Op


@triton.jit
def _key_norm(kv, weight, D, BLOCKS, eps, NORMED: tl.constexpr, BC: tl.constexpr):
    """Normalises in place the key of one text token of one block per program."""
    row, block = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BC)
    keep = cols < D
    at = kv + (row.to(tl.int64) * BLOCKS + block) * (2 * D) + cols
    k = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    if NORMED:
        k *= tl.rsqrt(tl.sum(k * k, 0) / D + eps)
    k *= tl.load(weight + block * D + cols, mask=keep, other=0.0)
    tl.store(at, k.to(kv.dtype.element_ty), mask=keep)


@triton.jit
def _softmax_step(q, scale, k, v, visible, top, total, acc, PRECISION: tl.constexpr):
    """Adds a block of keys to an online softmax; returns largest score, sum, and weighted sum of values."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
    s = tl.where(visible[None, :], s, -1e30)
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(p, 1)
    return higher, total, tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)


@triton.jit
def _cross_attention(
    query, rms, kv, lengths, out, N, T, D, KV_ROW, AT, per_scale,
    HD: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    NORMED: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends with BM tokens of one head per program; AT: offset of the block's keys in a row of kv."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d, t = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, HP), tl.arange(0, BT)
    row = image * N + n
    mask = (n < N)[:, None] & (d < HD)[None, :]
    q = tl.load(query + row[:, None] * D + head * HD + d[None, :], mask=mask, other=0.0)
    scale = tl.full((BM,), 1.4426950408889634, tl.float32)  # exp2 of scores over ln 2
    if NORMED:
        scale *= tl.load(rms + row, mask=n < N, other=0.0)
    length = tl.minimum(tl.load(lengths + image), T)
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, HP), tl.float32)
    at = kv + (image * T + t)[:, None] * KV_ROW + AT + head * HD + d[None, :]
    inside = (t < T)[:, None] & (d < HD)[None, :]  # most texts fit the first block, whose loads start at once
    k, v = tl.load(at, mask=inside, other=0.0), tl.load(at + D, mask=inside, other=0.0)
    top, total, acc = _softmax_step(q, scale, k, v, t < length, top, total, acc, PRECISION)
    for start in range(BT, length, BT):
        at += BT * KV_ROW
        inside = (start + t < length)[:, None] & (d < HD)[None, :]
        k, v = tl.load(at, mask=inside, other=0.0), tl.load(at + D, mask=inside, other=0.0)
        top, total, acc = _softmax_step(q, scale, k, v, start + t < length, top, total, acc, PRECISION)
    to = out + row[:, None] * D + head * HD + d[None, :]
    acc = acc / total[:, None]
    if NARROW:
        acc = as_fp8(acc, per_scale)
    tl.store(to, acc.to(out.dtype.element_ty), mask=mask)


def run_key_norm(launch: Launcher, kv: Tensor, weight: Tensor, normed: bool, eps: float) -> Tensor:
    blocks, dim = weight.shape
    wide = triton.next_power_of_2(dim)
    launch(_key_norm, (kv.shape[0], blocks), kv, weight, dim, blocks, eps, NORMED=normed, BC=wide, num_warps=4)
    return kv


def reference_key_norm(kv: Tensor, weight: Tensor, normed: bool, eps: float) -> Tensor:
    """Divides the keys of kv [rows, L*2*D] by their rms (if normed) and multiplies by weight [L, D] fp32, in place."""
    keys = kv.view(kv.shape[0], -1, 2, weight.shape[1])[:, :, 0]
    wide = keys.float()
    if normed:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    keys.copy_(wide * weight.float())
    return kv


def run(
    launch: Launcher, query: Tensor, kv: Tensor, lengths: Tensor, block: int, heads: int, normed: bool, eps: float,
    out_scale: float | None = None,
) -> Tensor:  # fmt: skip
    rows, dim = query.shape
    batch, head_dim = lengths.shape[0], dim // heads
    tokens = rows // batch
    rms = query
    if normed:
        rms = torch.empty(rows, dtype=torch.float32, device=query.device)
        wide = triton.next_power_of_2(dim)
        launch(_row_rms, (rows,), query, rms, dim, 0, dim, eps, BC=wide, num_warps=2 if wide <= 2048 else 4)
    out = torch.empty_like(query, dtype=query.dtype if out_scale is None else FP8)
    tall = min(64, max(16, triton.next_power_of_2(tokens)))
    launch(
        _cross_attention, (triton.cdiv(tokens, tall), heads, batch),
        query, rms, kv, lengths, out, tokens, kv.shape[0] // batch, dim, kv.shape[1], block * 2 * dim,
        per_scale(out_scale),
        HD=head_dim, HP=max(16, triton.next_power_of_2(head_dim)), BM=tall, BT=32, NORMED=normed,
        NARROW=out_scale is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4,
        num_stages=2,
    )  # fmt: skip
    return out


def reference(
    query: Tensor, kv: Tensor, lengths: Tensor, block: int, heads: int, normed: bool, eps: float,
    out_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attends with query [B*N, D] (over its rms if normed) to block `block` of kv after KEY_NORM; lengths [B] int32.

    KEY_NORM already scaled the scores. Computes in fp32 and rounds once; with out_scale, result / out_scale
    to e4m3.
    """
    (rows, dim), batch = query.shape, lengths.shape[0]
    q = query.float()
    if normed:
        q = q * torch.rsqrt(q.square().mean(1, keepdim=True) + eps)
    k, v = kv.view(batch, -1, kv.shape[1] // (2 * dim), 2, dim)[:, :, block].float().unbind(2)
    q, k, v = (part.reshape(batch, -1, heads, dim // heads).transpose(1, 2) for part in (q, k, v))
    hidden = torch.arange(k.shape[2], device=kv.device) >= lengths[:, None, None, None]
    scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -1e30)
    return rounded((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, dim), query, out_scale)


KEY_NORM = Op("key_norm", run_key_norm, reference_key_norm)
CROSS_ATTENTION = Op("cross_attention", run, reference)
