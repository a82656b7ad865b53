"""gelu_tanh(gate) * up of one fused product: y [M, 2N], gate before up, to [M, N]."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.op import Launcher, Op


@triton.jit
def gelu_tanh(x):
    """Returns x / 2 * (1 + tanh(z)) = x * sigmoid(2z), z = sqrt(2/pi) * (x + 0.044715 x³), with 2z clamped at -80."""
    return x * tl.sigmoid(tl.maximum(1.5957691216057308 * (x + 0.044715 * x * x * x), -80.0))


@triton.jit
def _gelu_gate(y, out, N, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    keep = cols < N
    gate = tl.load(y + row * 2 * N + cols, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(y + (row * 2 + 1) * N + cols, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * N + cols, (gelu_tanh(gate) * up).to(out.dtype.element_ty), mask=keep)


def run(launch: Launcher, y: Tensor) -> Tensor:
    rows, width = y.shape[0], y.shape[1] // 2
    out = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(width))
    launch(_gelu_gate, (rows, triton.cdiv(width, block)), y, out, width, BN=block, num_warps=4)
    return out


def reference(y: Tensor) -> Tensor:
    """Returns GELU (tanh form) of the first half times the second, in fp32, rounded once."""
    gate, up = y.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(y.dtype)


GELU_GATE = Op("gelu_gate", run, reference)
