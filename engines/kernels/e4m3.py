"""E4M3, the floating type of 8 bits in which products read their operands: rounding to it, in and out of kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
HEADROOM = 2.0  # an activation's range over the largest value in calibration


@triton.jit
def as_fp8(x, per_scale):
    """Returns x * per_scale, clamped to e4m3's range; a division per number would cost half a convolution or more."""
    return tl.minimum(tl.maximum(x * per_scale, -448.0), 448.0)


def quantised(x: Tensor, scale: float) -> Tensor:
    """Returns x / scale in e4m3, clamped to its range."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def rounded(x: Tensor, like: Tensor, scale: float | None) -> Tensor:
    """Returns x in the type of `like`, or x / scale in e4m3."""
    return x.to(like.dtype) if scale is None else quantised(x, scale)


def input_scale(largest: float) -> float:
    """Returns the scale of an activation whose largest value in calibration was `largest`."""
    return max(largest, 1e-6) * HEADROOM / FP8_MAX


def per_scale(scale: float | None) -> float:
    """Returns the factor of `as_fp8`."""
    return 1.0 if scale is None else 1 / scale


def power_of_two_scales(weight: Tensor) -> Tensor:
    """Returns a scale for each row of [N, K], fp32 [N]: the least power of two with which the row fits e4m3's range.

    So e4m3 times scale is exact in bf16.
    """
    largest = weight.float().abs().amax(1).clamp_min(1e-12) / FP8_MAX
    return torch.exp2(torch.ceil(torch.log2(largest)))
