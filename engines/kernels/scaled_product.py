"""Products of e4m3 operands by cuBLAS: x [M, K], weight [N, K], a scale each, bias [N] or None -> bf16 [M, N].

A scale is one number (fp32 []) for a whole operand, which cuBLASLt applies on every card with fp8. K and N are
multiples of 16. Sums stay in the precision of Hopper's tensor cores, less than fp32 (fast accumulation).
"""

import torch
from torch import Tensor

from engines.kernels.op import Launcher, Op

MULTIPLE = 16  # of K and N, in torch._scaled_mm


def run(
    _launch: Launcher, x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor, weight_scale: Tensor
) -> Tensor:
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Returns (x @ weight.T) * x_scale * weight_scale + bias in fp32, rounded once."""
    y = (x.float() @ weight.float().T) * (x_scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


SCALED_PRODUCT = Op("scaled_product", run, reference)
