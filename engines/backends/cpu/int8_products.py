"""The transformer's maps of image tokens in 8 bits, on a CPU with VNNI: twice the rate of fp32.

Weights are rounded once, with a scale per output. Activations are rounded at every call, with a scale per row (an image
token): this needs no calibration, and a row does not depend on the others. Sums are exact (int32). Norms, linear
attention, and keys and values of the text stay as they are. All of this is as in SANA's own deployment in 8 bits (SANA
paper, On-device deployment).

Shapes: x [..., in], weight [out, in]; of images [B, C, H, W], channels-last in memory.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engines.backends.cpu.int8 import ROUNDING_OFFSET, rounded_weight

PRODUCTS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"),
)  # of a block

_ZERO = 128  # of activations: the kernel multiplies unsigned by signed numbers
_SLICE_NUMEL = 2**17  # numbers that are rounded at once: 0.5 MiB in fp32, so that they stay in the L2 cache


class Int8Linear(nn.Module):
    """Computes y [..., out] of x [..., in], both fp32. A row with a value that is not finite becomes NaN."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rounded, self._scales = rounded_weight(weight.detach())
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = torch.zeros(len(weight)) if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        levels, scales = rounded_rows(x.reshape(-1, x.shape[-1]))
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, _ZERO, self._weight, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self._bias, y, scales, out=y).view(*x.shape[:-1], -1)


class Int8Pointwise(nn.Module):
    """Computes a 1x1 convolution of [B, C, H, W]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._linear = Int8Linear(conv.weight.flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._linear(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns round(x / scale) + 128 of x [rows, in] as uint8, and the scales [rows, 1]."""
    levels, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty((len(x), 1))
    offset = torch.tensor(ROUNDING_OFFSET + _ZERO)
    step = max(1, _SLICE_NUMEL // x.shape[1])
    for part in (slice(first, first + step) for first in range(0, len(x), step)):
        torch.amax(x[part].abs(), 1, keepdim=True, out=scales[part])
        scales[part].clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
        levels[part] = torch.add(offset, x[part] / scales[part]).view(torch.int32)  # uint8 keeps the low byte
    return levels, scales


def convert(blocks: Iterable[nn.Module]) -> int:
    """Replaces PRODUCTS of the blocks, and frees their weights; those with adapters stay. Returns how many it did."""
    converted = 0
    for block in blocks:
        for name in PRODUCTS:
            product = block.get_submodule(name)
            if type(product) is nn.Linear:
                block.set_submodule(name, Int8Linear(product.weight, product.bias))
            elif type(product) is nn.Conv2d:
                block.set_submodule(name, Int8Pointwise(product))
            else:  # converted before, or with adapters
                continue
            converted += 1
    return converted
