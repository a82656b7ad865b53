"""The transformer's maps of image tokens in 8 bits, on a CPU with VNNI: twice the rate of bf16, or of fp32 without it.

Weights are rounded once, with a scale per output. Activations are rounded at every call, with a scale per row (an image
token): this needs no calibration, and a row does not depend on the others. Sums are exact (int32). Norms, linear
attention, and keys and values of the text stay as they are. All of this is as in SANA's own deployment in 8 bits (SANA
paper, On-device deployment).

Shapes: x [..., in], weight [out, in]; of images [B, C, H, W], channels-last in memory.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from engines.backends.cpu.int8 import ROUNDING_OFFSET, rounded_weight
from engines.backends.cpu.kernels import gated_depthwise
from engines.backends.cpu.kernels.gated_depthwise import Rounded
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.packed_linear import ProductFactory, exact_products, product_of
from engines.backends.cpu.timings import Timings, in_words
from engines.models.transformer import TransformerConfig

PRODUCTS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"),
)  # of a block

_ZERO = 128  # of activations: the kernel multiplies unsigned by signed numbers
_SLICE_NUMEL = 2**17  # numbers that are rounded at once: 0.5 MiB in fp32, so that they stay in the L2 cache
_WORTH = 0.8  # of the exact map's time, which 8 bits may take
_ROWS = 256  # that the measured map reads

Rounding = Callable[[Tensor], Rounded]


class LastRounding:
    """Rounds the rows of a tensor, once for all maps that read it in turn (queries, keys and values)."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Rounded] | None = None

    def __call__(self, x: Tensor) -> Rounded:
        if self._last is None or self._last[0] is not x:
            self._last = x, rounded_rows(x)
        return self._last[1]


class Int8Linear(nn.Module):
    """Computes y [..., out] of x [..., in], both fp32 or bf16. A row with a value that is not finite becomes NaN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        rounded, self._scales = rounded_weight(weight.detach().float())
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        self._rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rounded(*self._rounding(x)).view(*x.shape[:-1], -1)

    def of_rounded(self, levels: Tensor, scales: Tensor) -> Tensor:
        """Returns [rows, out] of rounded rows."""
        y = self._sums(levels, scales.dtype)
        return torch.addcmul(self.bias, y, scales, out=y)

    def unscaled(self, x: Tensor) -> Rounded:
        """Returns y [rows, out] and scales [rows, 1] in the dtype of x; the result is y * scales + bias."""
        levels, scales = self._rounding(x)
        return self._sums(levels, scales.dtype), scales

    def _sums(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, _ZERO, self._weight, self._scales, self._zeros, None, 1.0, 0, dtype, "none", [], ""
        )
        return y


class Int8Pointwise(nn.Module):
    """Computes a 1x1 convolution of [B, C, H, W]."""

    def __init__(self, conv: nn.Conv2d, rounding: Rounding) -> None:
        super().__init__()
        self._linear = Int8Linear(conv.weight.flatten(1), conv.bias, rounding)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._linear(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def rounded_rows(x: Tensor) -> Rounded:
    """Returns round(x / scale) + 128 of x [..., in] as uint8 [rows, in], and the scales [rows, 1] in the dtype of x."""
    x = x.reshape(-1, x.shape[-1])
    levels, scales = torch.empty(x.shape, dtype=torch.uint8), x.new_empty((len(x), 1))
    offset = torch.tensor(ROUNDING_OFFSET + _ZERO)
    step = max(1, _SLICE_NUMEL // x.shape[1])
    for part in (slice(first, first + step) for first in range(0, len(x), step)):
        torch.amax(x[part].abs(), 1, keepdim=True, out=scales[part])
        # bf16 rounds a scale by 0.39 % at most, which makes 127 levels 127.496: still 127.
        scales[part].clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
        levels[part] = torch.add(offset, x[part] / scales[part].float()).view(torch.int32)  # uint8 keeps the low byte
    return levels, scales


def int8_products(library: Library) -> ProductFactory:
    """Returns what builds products in 8 bits whose rows the library rounds."""
    rounding = partial(gated_depthwise.rounded_rows, library=library)
    return lambda weight, bias: Int8Linear(weight, bias, rounding)


def faster_in_8_bits(config: TransformerConfig, dtype: torch.dtype, timings: Timings) -> tuple[bool, str]:
    """Measures a transformer's widest map. Returns whether 8 bits are clearly faster than `dtype`, and the times."""
    name, hidden = str(dtype).removeprefix("torch."), int(config.mlp_ratio * config.dim)

    def ways() -> dict[str, Callable[[], object]]:
        linear = nn.Linear(config.dim, 2 * hidden, dtype=dtype).requires_grad_(False)
        x = torch.empty((_ROWS, config.dim), dtype=dtype).normal_(generator=torch.Generator().manual_seed(0))
        exact, converted = product_of(linear, exact_products(dtype)), Int8Linear(linear.weight, None, rounded_rows)
        return {"8 bits": lambda: converted(x), name: lambda: exact(x)}

    found = timings.of(f"product of {config.dim} to {2 * hidden}", ("8 bits", name), ways)
    return found["8 bits"] < _WORTH * found[name], in_words(found)


def convert(blocks: Iterable[nn.Module]) -> None:
    """Replaces PRODUCTS of the blocks, and frees their weights; those with adapters stay."""
    rounding = LastRounding()
    for block in blocks:
        for name in PRODUCTS:
            product = block.get_submodule(name)
            if type(product) is nn.Linear:
                block.set_submodule(name, Int8Linear(product.weight, product.bias, rounding))
            elif type(product) is nn.Conv2d:
                block.set_submodule(name, Int8Pointwise(product, rounding))
