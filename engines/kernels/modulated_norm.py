"""LayerNorm without weights, its modulation, and the residuals before it, in one pass over x [B*N, D].

    x_new = x + gate * y + extra        h = LN(x_new) * (1 + scale) + shift

as operations: MODULATED_NORM returns h of x, RESIDUAL_NORM (x_new, h), RESIDUAL x_new, RESIDUAL_FP8 x_new twice. gate,
scale and shift are rows [B, D] of a larger modulation (last dimension contiguous). gate None means 1. extra is the
ControlNet's residual [B*N, D]; None means 0. With out_scale, h is h / out_scale in e4m3, as the next product reads it;
RESIDUAL_FP8 returns x_new so beside x_new itself. A program takes one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.e4m3 import FP8, as_fp8, per_scale, quantised, rounded
from engines.kernels.op import Launcher, Op


@triton.jit
def _modulated_norm(
    x, y, extra, gate, scale, shift, to_x, to_h, N, D, GATE_ROW, SCALE_ROW, eps, per_scale,
    ADDED: tl.constexpr, GATED: tl.constexpr, EXTRA: tl.constexpr, NORMED: tl.constexpr, NARROW: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // N
    cols = tl.arange(0, BC)
    keep = cols < D
    at = row * D + cols
    v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if ADDED:
        more = tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + image * GATE_ROW + cols, mask=keep, other=0.0).to(tl.float32)
        v += more
        if EXTRA:
            v += tl.load(extra + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(to_x + at, v.to(to_x.dtype.element_ty), mask=keep)
    if NORMED:
        v = tl.where(keep, v - tl.sum(v, 0) / D, 0.0)
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v *= 1.0 + tl.load(scale + image * SCALE_ROW + cols, mask=keep, other=0.0).to(tl.float32)
        v += tl.load(shift + image * SCALE_ROW + cols, mask=keep, other=0.0).to(tl.float32)
    if NARROW:
        v = as_fp8(v, per_scale)
    if NORMED or NARROW:
        tl.store(to_h + at, v.to(to_h.dtype.element_ty), mask=keep)


def _run(
    launch: Launcher, x: Tensor, y: Tensor | None, gate: Tensor | None, extra: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, batch: int, eps: float, out_scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, width = x.shape
    if scale is not None and shift is not None and scale.stride(0) != shift.stride(0):
        raise ValueError("scale and shift: different strides; both must be rows of one modulation")
    to_x = x if y is None else torch.empty_like(x)
    to_h = x if scale is None else torch.empty_like(x)
    if out_scale is not None:
        to_h = torch.empty_like(x, dtype=FP8)
    wide = triton.next_power_of_2(width)
    launch(
        _modulated_norm, (rows,), x, *(x if operand is None else operand for operand in (y, extra, gate, scale, shift)),
        to_x, to_h, rows // batch, width, *(0 if row is None else row.stride(0) for row in (gate, scale)), eps,
        per_scale(out_scale), ADDED=y is not None, GATED=gate is not None, EXTRA=extra is not None,
        NORMED=scale is not None, NARROW=out_scale is not None, BC=wide, num_warps=max(1, min(8, wide // 512)),
    )  # fmt: skip
    return to_x, to_h


def run_norm(
    launch: Launcher, x: Tensor, scale: Tensor, shift: Tensor, batch: int, eps: float, out_scale: float | None = None
) -> Tensor:
    return _run(launch, x, None, None, None, scale, shift, batch, eps, out_scale)[1]


def run_residual_norm(
    launch: Launcher, x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None,
    scale: Tensor, shift: Tensor, batch: int, eps: float, out_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run(launch, x, y, gate, extra, scale, shift, batch, eps, out_scale)


def run_residual(
    launch: Launcher, x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, batch: int
) -> Tensor:
    return _run(launch, x, y, gate, extra, None, None, batch, 0.0, None)[0]


def run_residual_fp8(
    launch: Launcher, x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, batch: int, out_scale: float
) -> tuple[Tensor, Tensor]:
    return _run(launch, x, y, gate, extra, None, None, batch, 0.0, out_scale)


def _added(x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, batch: int) -> Tensor:
    more = (
        y.float()
        if gate is None
        else (torch.unflatten(y.float(), 0, (batch, -1)) * gate.float()[:, None]).flatten(0, 1)
    )
    added = x.float() + more
    return added if extra is None else added + extra.float()


def _normed(x: Tensor, scale: Tensor, shift: Tensor, batch: int, eps: float) -> Tensor:
    x = torch.unflatten(torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps), 0, (batch, -1))
    return (x * (1 + scale.float()[:, None]) + shift.float()[:, None]).flatten(0, 1)


def reference_norm(
    x: Tensor, scale: Tensor, shift: Tensor, batch: int, eps: float, out_scale: float | None = None
) -> Tensor:
    """Returns LN(x) * (1 + scale) + shift in fp32, rounded once."""
    return rounded(_normed(x.float(), scale, shift, batch, eps), x, out_scale)


def reference_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, scale: Tensor, shift: Tensor, batch: int,
    eps: float, out_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns x_new = x + gate * y + extra, and LN(x_new) * (1 + scale) + shift of the unrounded x_new."""
    added = _added(x, y, gate, extra, batch)
    return added.to(x.dtype), rounded(_normed(added, scale, shift, batch, eps), x, out_scale)


def reference_residual(x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, batch: int) -> Tensor:
    """Returns x + gate * y + extra in fp32, rounded once."""
    return _added(x, y, gate, extra, batch).to(x.dtype)


def reference_residual_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, extra: Tensor | None, batch: int, out_scale: float
) -> tuple[Tensor, Tensor]:
    """Returns x_new = x + gate * y + extra in x's type, and x_new / out_scale in e4m3, each rounded once."""
    added = _added(x, y, gate, extra, batch)
    return added.to(x.dtype), quantised(added, out_scale)


MODULATED_NORM = Op("modulated_norm", run_norm, reference_norm)
RESIDUAL_NORM = Op("residual_norm", run_residual_norm, reference_residual_norm)
RESIDUAL = Op("residual", run_residual, reference_residual)
RESIDUAL_FP8 = Op("residual_fp8", run_residual_fp8, reference_residual_fp8)
