"""3x3 convolution of zero-bordered NHWC images (see padded.py) as nine shifted products, with a fused epilogue:

    CONVOLUTION        none
    CONVOLUTION_SILU   + bias, SiLU; to bf16, or to e4m3 for the next convolution
    CONVOLUTION_NORM   RMSNorm over channels, weight, bias, + residual; to bf16, and optionally to e4m3 too
    CONVOLUTION_TAPS   the same, then a second RMSNorm, ReLU and a product with the taps of a 3x3 convolution to 3
                       channels: each pixel's terms for its nine neighbours, which pixels.py sums; no image is written

x [P, C] in bf16 or e4m3, weight [N, 9*C] of the same type, k = tap*C + channel; P = grid.padded. scale [N] fp32
dequantises 8-bit products; None for bf16. Borders are written as zeros. Source of the form: implicit GEMM.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.activations import silu
from engines.kernels.autoencoder.padded import Grid, image_of, pad
from engines.kernels.autoencoder.tiles import halves, inside, matrix, tile_at, tile_for
from engines.kernels.e4m3 import FP8, as_fp8, quantised
from engines.kernels.op import Launcher, Op

TAP_OUTPUTS = 27  # 9 taps of 3 channels
_TAP_COLUMNS = 32  # TAP_OUTPUTS padded to a product's tile


@triton.jit
def _residual(r, m0, n0, at, keep, TMA: tl.constexpr):
    tile = r.load([m0, n0]) if TMA else tl.load(r + at, mask=keep, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _write(y, acc, m0, n0, at, fits, TMA: tl.constexpr):
    if TMA:
        y.store([m0, n0], acc.to(y.dtype))
    else:
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=fits)


@triton.jit
def _finish(
    acc, y, y8, bias, gain, residual, m0, n0, rows, keep, P, per_scale,
    N: tl.constexpr, BH: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Applies the epilogue to the sums of BH columns from n0 on; a norm's division is already done."""
    cols = n0 + tl.arange(0, BH)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    fits = (rows < P)[:, None]
    if KIND == 1:
        acc += tl.load(bias + cols)[None, :]
        acc = silu(acc)
        if SCALED:
            acc = as_fp8(acc, per_scale)
    if KIND == 2:
        acc = acc * tl.load(gain + cols)[None, :] + tl.load(bias + cols)[None, :]
        acc += _residual(residual, m0, n0, at, keep, TMA)
    acc = tl.where(keep, acc, 0.0)
    _write(y, acc, m0, n0, at, fits, TMA)
    if SECOND:
        _write(y8, as_fp8(acc, per_scale), m0, n0, at, fits, TMA)


@triton.jit
def _convolution(
    x, w, y, y8, taps, scale, bias, gain, residual, gain2, bias2, w2, P, HP, WP, eps, per_scale, C: tl.constexpr,
    N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
    SECOND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """KIND 0: plain, 1: SiLU, 2: norm, 3: taps. SECOND: y8 is written too."""
    across: tl.constexpr = N // BN
    steps: tl.constexpr = C // BK
    for tile in tl.range(tl.program_id(0), tl.cdiv(P, BM) * across, tl.num_programs(0)):
        m0 = (tile // across) * BM
        n0 = (tile % across) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for t in range(9 * steps):
            tap = t // steps
            shift = (tap // 3 - 1) * WP + tap % 3 - 1
            a = tile_at(x, m0 + shift, (t % steps) * BK, P, C, BM, BK, TMA)
            b = tile_at(w, n0, t * BK, N, 9 * C, BN, BK, TMA)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        rows = m0 + tl.arange(0, BM)
        keep = inside(rows, P, HP, WP)[:, None]
        if SCALED:
            acc *= tl.load(scale + n0 + tl.arange(0, BN))[None, :]
        if KIND >= 2:
            acc = acc * tl.rsqrt(tl.sum(acc * acc, 1) / N + eps)[:, None]
        left, right = halves(acc, BM, BN)
        if KIND < 3:
            half: tl.constexpr = BN // 2
            _finish(
                left, y, y8, bias, gain, residual, m0, n0, rows, keep, P, per_scale, N, half, KIND, SCALED, SECOND, TMA
            )
            _finish(
                right, y, y8, bias, gain, residual, m0, n0 + half, rows, keep, P, per_scale,
                N, half, KIND, SCALED, SECOND, TMA,
            )  # fmt: skip
        else:
            near = tl.arange(0, BN // 2)
            far = BN // 2 + near
            at = rows[:, None].to(tl.int64) * N
            left = left * tl.load(gain + near)[None, :] + tl.load(bias + near)[None, :]
            left += _residual(residual, m0, 0, at + near[None, :], keep, TMA)
            right = right * tl.load(gain + far)[None, :] + tl.load(bias + far)[None, :]
            right += _residual(residual, m0, BN // 2, at + far[None, :], keep, TMA)
            rms = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / N + eps)[:, None]
            left = tl.maximum(left * rms * tl.load(gain2 + near)[None, :] + tl.load(bias2 + near)[None, :], 0.0)
            right = tl.maximum(right * rms * tl.load(gain2 + far)[None, :] + tl.load(bias2 + far)[None, :], 0.0)
            columns = tl.arange(0, 32)
            w_left = tl.load(w2 + near[:, None] * 32 + columns[None, :])
            w_right = tl.load(w2 + far[:, None] * 32 + columns[None, :])
            terms = tl.dot(left.to(w_left.dtype), w_left, input_precision="ieee")
            terms = tl.dot(right.to(w_right.dtype), w_right, terms, input_precision="ieee")
            terms = tl.where(keep, tl.minimum(tl.maximum(terms, -65504.0), 65504.0), 0.0)
            target = columns[None, :].to(tl.int64) * P + rows[:, None]
            tl.store(taps + target, terms.to(tl.float16), mask=(rows < P)[:, None] & (columns < 27)[None, :])


def _launch(
    launch: Launcher, x: Tensor, w: Tensor, y: Tensor, grid: Grid, kind: int, whole: bool, **operands: Any
) -> None:
    channels, columns = x.shape[1], w.shape[0]
    fp8 = x.dtype == FP8
    tile = tile_for(channels, columns, fp8, whole, launch.tma)
    second = operands.get("y8")

    def half(t: Tensor) -> Any:
        return matrix(t, tile.rows, tile.columns // 2, launch.tma)

    programs = min(launch.processors, triton.cdiv(grid.padded, tile.rows) * (columns // tile.columns))
    launch(
        _convolution, (programs,), matrix(x, tile.rows, tile.depth, launch.tma),
        matrix(w, tile.columns, tile.depth, launch.tma), y if kind == 3 else half(y),
        y if second is None else half(second), y, operands.get("scale", x), operands.get("bias", x),
        operands.get("gain", x), half(operands["residual"]) if "residual" in operands else x, operands.get("gain2", x),
        operands.get("bias2", x), operands.get("w2", x), grid.padded, grid.height + 2, grid.width + 2,
        operands.get("eps", 0.0), 1 / operands.get("out_scale", 1.0), C=channels, N=columns, BM=tile.rows,
        BK=tile.depth, BN=tile.columns, KIND=kind, SCALED=fp8, SECOND=second is not None, TMA=launch.tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _scaled(scale: Tensor | None) -> dict[str, Tensor]:
    return {} if scale is None else {"scale": scale}


def run(launch: Launcher, x: Tensor, weight: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
    y = torch.empty(x.shape[0], weight.shape[0], dtype=_wide(x), device=x.device)
    _launch(launch, x, weight, y, grid, 0, False, **_scaled(scale))
    return y


def run_silu(
    launch: Launcher, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, out_scale: float, grid: Grid,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(launch, x, weight, y, grid, 1, False, bias=bias, out_scale=out_scale, **_scaled(scale))
    return y


def run_norm(
    launch: Launcher, x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor, bias: Tensor, residual: Tensor,
    eps: float, out_scale: float | None, grid: Grid,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = torch.empty_like(residual)
    more: dict[str, Any] = _scaled(scale)
    outputs: tuple[Tensor, ...] = (y,)
    if out_scale is not None:
        more |= {"y8": torch.empty_like(residual, dtype=FP8), "out_scale": out_scale}
        outputs = (y, more["y8"])
    _launch(launch, x, weight, y, grid, 2, True, gain=gain, bias=bias, residual=residual, eps=eps, **more)
    return outputs


def run_taps(
    launch: Launcher, x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor, bias: Tensor, residual: Tensor,
    gain2: Tensor, bias2: Tensor, out_weight: Tensor, eps: float, grid: Grid,
) -> Tensor:  # fmt: skip
    taps = torch.empty(TAP_OUTPUTS, grid.padded, dtype=torch.float16, device=x.device)
    last = {"gain2": gain2, "bias2": bias2, "w2": out_weight}
    _launch(
        launch, x, weight, taps, grid, 3, True, gain=gain, bias=bias, residual=residual, eps=eps, **last,
        **_scaled(scale),
    )  # fmt: skip
    return taps


def tap_weight(weight: Tensor) -> Tensor:
    """Returns a convolution's weight [3, C, 3, 3] as [C, 32] for CONVOLUTION_TAPS: 9 taps of 3 channels, padded."""
    rows = weight.permute(1, 2, 3, 0).reshape(weight.shape[1], TAP_OUTPUTS)
    return F.pad(rows, (0, _TAP_COLUMNS - TAP_OUTPUTS)).contiguous()


def products(x: Tensor, weight: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
    """Returns the convolution without epilogue, in fp32: [B, N, H, W]."""
    kernel = weight.float().view(weight.shape[0], 3, 3, x.shape[1]).permute(0, 3, 1, 2)
    y = F.conv2d(image_of(x.float(), grid), kernel, padding=1)
    return y if scale is None else y * scale[:, None, None]


def normed(y: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the RMSNorm of [B, N, H, W] over channels, in fp32."""
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
    return y * gain[:, None, None] + bias[:, None, None]


def _wide(x: Tensor) -> torch.dtype:
    """Returns the output type: bf16 for 8-bit products, else the input's."""
    return torch.bfloat16 if x.dtype == FP8 else x.dtype


def reference(x: Tensor, weight: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
    return pad(products(x, weight, scale, grid)).to(_wide(x))


def reference_silu(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor, out_scale: float, grid: Grid
) -> Tensor:
    y = pad(F.silu(products(x, weight, scale, grid) + bias[:, None, None]))
    return quantised(y, out_scale) if x.dtype == FP8 else y.to(x.dtype)


def reference_norm(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor, bias: Tensor, residual: Tensor, eps: float,
    out_scale: float | None, grid: Grid,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = normed(products(x, weight, scale, grid), gain, bias, eps) + image_of(residual.float(), grid)
    padded = pad(y)
    wide = padded.to(residual.dtype)
    return (wide,) if out_scale is None else (wide, quantised(padded, out_scale))


def reference_taps(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor, bias: Tensor, residual: Tensor, gain2: Tensor,
    bias2: Tensor, out_weight: Tensor, eps: float, grid: Grid,
) -> Tensor:  # fmt: skip
    y = normed(products(x, weight, scale, grid), gain, bias, eps) + image_of(residual.float(), grid)
    y = F.relu(normed(y, gain2, bias2, eps)).to(out_weight.dtype).float()
    terms = torch.einsum("bchw,cn->bnhw", y, out_weight.float())[:, :TAP_OUTPUTS]
    return pad(terms.clamp(-65504, 65504)).t().to(torch.float16).contiguous()


CONVOLUTION = Op("convolution", run, reference)
CONVOLUTION_SILU = Op("convolution_silu", run_silu, reference_silu)
CONVOLUTION_NORM = Op("convolution_norm", run_norm, reference_norm)
CONVOLUTION_TAPS = Op("convolution_taps", run_taps, reference_taps)
