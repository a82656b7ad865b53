"""Gemma's attention in one launch: L new tokens attend to a prefix that all prompts share, and causally to each other.

Maps qkv [B, L, (H + 2K)*d] of the fused product to [B, L, H*d]. Fused: rotation of queries and new keys, capped logits,
softmax, sliding window. With |logit| <= cap the softmax needs no maximum, because fp32 and bf16 hold exp(50). So tiles
of keys add up without rescaling. The H/K queries of a key head are stacked as rows. Programs split rows, key heads and
value columns, so no result needs combining.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op
from engines.kernels.text.prefetch import prefetch, share

MAX_CAP = 60.0  # exp(60) * 10^5 keys is 1e31
_FETCHERS = 64  # least number of programs that prefetch


@triton.jit
def _rotate(first, second, cosine, sine):
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _softmax_weights(q1, q2, k1, k2, visible, scale, cap):
    """Returns exp of capped logits, 0 if not visible. scale includes 1 / cap; tanh by exp of x <= 0 stays finite."""
    logits = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    logits = tl.dot(q2, tl.trans(k2), logits, input_precision="ieee") * scale
    small = tl.exp(-2.0 * tl.abs(logits))
    capped = cap * (1.0 - small) / (1.0 + small)
    return tl.where(visible, tl.exp(tl.where(logits < 0, -capped, capped)), 0.0)


@triton.jit
def _capped_attention(
    qkv, past_key, past_value, shared, cosine, sine, out, ahead, lines, L, P, positions, scale, cap, B,
    H: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, HALF: tl.constexpr, BV: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if STEP > 0:  # noqa: SIM102  # the first is known at compile time
        if tl.program_id(2) >= B:
            plane = tl.num_programs(0) * tl.num_programs(1)
            index = (tl.program_id(2) - B) * plane + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            prefetch(ahead, lines, index, (tl.num_programs(2) - B) * plane, STEP)
            return
    K: tl.constexpr = H // G
    SLICES: tl.constexpr = (DIM + BV - 1) // BV
    HD: tl.constexpr = DIM // 2
    WIDTH: tl.constexpr = (H + 2 * K) * DIM
    head = tl.program_id(1) // SLICES  # of the keys
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(shared + batch).to(tl.int32)
    row_qkv = qkv + batch * L * WIDTH
    half = tl.arange(0, HALF)
    in_half = half < HD
    column = (tl.program_id(1) % SLICES) * BV + tl.arange(0, BV)
    in_column = column < DIM

    # A row is one query head of one token.
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = row // G
    query = head * G + row % G
    in_query = (token < L)[:, None] & in_half[None, :]
    at = token[:, None] * WIDTH + query[:, None] * DIM + half[None, :]
    q1 = tl.load(row_qkv + at, mask=in_query, other=0.0)
    q2 = tl.load(row_qkv + at + HD, mask=in_query, other=0.0)
    angle = tl.minimum(start + token, positions - 1)[:, None] * HD + half[None, :]
    cos = tl.load(cosine + angle, mask=in_query, other=0.0)
    sin = tl.load(sine + angle, mask=in_query, other=0.0)
    r1, r2 = _rotate(q1.to(tl.float32), q2.to(tl.float32), cos, sin)
    q1, q2 = r1.to(q1.dtype), r2.to(q2.dtype)

    mixed = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    query_position = (start + token)[:, None]

    # Keys of the prefix.
    key_base = past_key + head * P * DIM
    value_base = past_value + head * P * DIM
    for n in range(0, start, BN):
        key = n + tl.arange(0, BN)
        inside = key < start
        key_at = key[:, None] * DIM + half[None, :]
        k1 = tl.load(key_base + key_at, mask=inside[:, None] & in_half[None, :], other=0.0)
        k2 = tl.load(key_base + key_at + HD, mask=inside[:, None] & in_half[None, :], other=0.0)
        value_at = key[:, None] * DIM + column[None, :]
        v = tl.load(value_base + value_at, mask=inside[:, None] & in_column[None, :], other=0.0)
        visible = inside[None, :]
        if WINDOW > 0:
            visible = visible & (query_position - key[None, :] < WINDOW)
        weight = _softmax_weights(q1, q2, k1, k2, visible, scale, cap)
        weight = weight.to(v.dtype)
        total += tl.sum(weight.to(tl.float32), 1)  # of the rounded weights, so that they add up to 1
        mixed = tl.dot(weight, v, mixed, input_precision="ieee")

    # Keys of the new tokens, up to the last of these rows.
    last = tl.minimum((tl.program_id(0) * BM + BM - 1) // G + 1, L)
    for n in range(0, last, BL):
        own = n + tl.arange(0, BL)
        is_there = (own < L)[:, None]
        own_at = own[:, None] * WIDTH + (H + head) * DIM + half[None, :]
        own1 = tl.load(row_qkv + own_at, mask=is_there & in_half[None, :], other=0.0)
        own2 = tl.load(row_qkv + own_at + HD, mask=is_there & in_half[None, :], other=0.0)
        value_own_at = own[:, None] * WIDTH + (H + K + head) * DIM + column[None, :]
        value = tl.load(row_qkv + value_own_at, mask=is_there & in_column[None, :], other=0.0)
        own_angle = tl.minimum(start + own, positions - 1)[:, None] * HD + half[None, :]
        own_cos = tl.load(cosine + own_angle, mask=in_half[None, :], other=0.0)
        own_sin = tl.load(sine + own_angle, mask=in_half[None, :], other=0.0)
        own_r1, own_r2 = _rotate(own1.to(tl.float32), own2.to(tl.float32), own_cos, own_sin)
        visible_own = own[None, :] <= token[:, None]
        if WINDOW > 0:
            visible_own = visible_own & (token[:, None] - own[None, :] < WINDOW)
        share = _softmax_weights(q1, q2, own_r1.to(own1.dtype), own_r2.to(own2.dtype), visible_own, scale, cap)
        share = share.to(value.dtype)
        total += tl.sum(share.to(tl.float32), 1)  # of the rounded weights, so that they add up to 1
        mixed = tl.dot(share, value, mixed, input_precision="ieee")

    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = token[:, None] * (H * DIM) + query[:, None] * DIM + column[None, :]
    keep = (token < L)[:, None] & in_column[None, :]
    tl.store(out + batch * L * (H * DIM) + at, mixed.to(out.dtype.element_ty), mask=keep)


def run(
    launch: Launcher, qkv: Tensor, past_key: Tensor, past_value: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor,
    scale: float, cap: float, window: int, ahead: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, length, width = qkv.shape
    keys, prefix, dim = past_key.shape
    heads = width // dim - 2 * keys
    group = heads // keys
    out = torch.empty(batch, length, heads * dim, dtype=qkv.dtype, device=qkv.device)
    # Few rows per program if there are few tokens: more programs run shorter chains of tiles.
    if length > 128:
        tall, tile, own, warps, stages = 64, 64, 32, 8, 2
    elif launch.tma:
        tall, tile, own, warps, stages = 16 if length <= 64 else 32, 64, 16 if length <= 16 else 32, 4, 3
    else:  # 99 KB of shared memory
        tall, tile, own, warps, stages = 16 if length <= 64 else 32, 32, 16, 4, 3
    columns = min(128, max(16, triton.next_power_of_2(dim)))
    plane = (triton.cdiv(group * length, tall), keys * triton.cdiv(dim, columns))
    lines, step = share(launch, ahead)
    fetchers = triton.cdiv(_FETCHERS, plane[0] * plane[1]) if step else 0
    launch(
        _capped_attention, (*plane, batch + fetchers),
        qkv, past_key, past_value, shared, cosine, sine, out, qkv if ahead is None else ahead, lines,
        length, prefix, cosine.shape[0], scale / cap, cap, batch,
        H=heads, G=group, DIM=dim, WINDOW=window if window < prefix + length else 0, BM=tall, BN=tile,
        BL=own, HALF=max(16, triton.next_power_of_2(dim // 2)), BV=columns, STEP=step,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def reference(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor,
    scale: float, cap: float, window: int, _ahead: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attends as Gemma. Row b follows the first shared[b] of the prefix's P keys and values [K, P, d].

    cosine, sine [positions, d/2] fp32. Logits are cap * tanh(q k * scale / cap), masked from a distance of `window` on.
    """
    batch, length, width = qkv.shape
    keys, prefix, dim = past_key.shape
    x = qkv.float().view(batch, length, -1, dim).transpose(1, 2)  # [B, H + 2K, L, d]
    heads = width // dim - 2 * keys
    own = torch.arange(length, device=qkv.device)
    position = shared.long()[:, None] + own  # [B, L]
    angle = position.clamp_max(cosine.shape[0] - 1)
    cos, sin = cosine[angle][:, None], sine[angle][:, None]  # [B, 1, L, d/2]
    first, second = x[:, : heads + keys].chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype).float()
    query = torch.unflatten(turned[:, :heads], 1, (keys, -1))  # [B, K, H/K, L, d]
    key = torch.cat([past_key.float().expand(batch, -1, -1, -1), turned[:, heads:]], dim=2)[:, :, None]
    value = torch.cat([past_value.float().expand(batch, -1, -1, -1), x[:, heads + keys :]], dim=2)[:, :, None]
    logits = cap * torch.tanh(query @ key.transpose(-1, -2) * (scale / cap))  # [B, K, H/K, L, P + L]
    before = torch.arange(prefix, device=qkv.device).expand(batch, -1)
    at = torch.cat([before, position], dim=1)  # [B, P + L]
    valid = torch.cat([before < shared[:, None], torch.ones_like(position, dtype=torch.bool)], dim=1)[:, None]
    distance = position[:, :, None] - at[:, None]  # [B, L, P + L]
    visible = valid & (distance >= 0) & (distance < window)
    mixed = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1) @ value
    return mixed.flatten(1, 2).transpose(1, 2).flatten(2).to(qkv.dtype)


CAPPED_ATTENTION = Op("capped_attention", run, reference)
