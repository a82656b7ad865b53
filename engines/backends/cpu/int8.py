"""Convolutions in 8 bits on a CPU with VNNI: twice the rate of bf16, at about 39 dB each.

Weights are rounded once, with a scale per output channel. Activations are rounded at every call, with a scale and zero
point per image: this needs no calibration, and an image does not depend on its batch. Sums are exact (int32); the
kernel applies bias and SiLU to them in fp32. The operators are those that torch.compile's CPU backend calls for
quantised models (torch/_inductor/fx_passes/quantization.py).

Shapes: [B, C, H, W], channels-last in memory.
"""

import torch
from torch import Tensor, nn

from engines.backends.cpu.convolution import TYPICAL_SIZE, cache_sized_slices
from engines.backends.cpu.kernels.layout import Edges, pixel_rows

_LEVELS = 254  # of 256: rounding the zero point may shift the range by half a level
ROUNDING_OFFSET = 1.5 * 2**23  # added to a small fp32 number, it rounds it into the lowest of fp32's 24 bits


def has_int8() -> bool:
    """Returns whether this CPU multiplies 8-bit numbers without intermediate overflow and torch has the operators."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # type: ignore[no-untyped-call]  # torch's own


class Int8Conv:
    """Conv as engines.backends.cpu.convolution.PackedConv, computed in 8 bits."""

    def __init__(self, conv: nn.Conv2d, *, silu: bool = False) -> None:
        assert not isinstance(conv.padding, str)
        rounded, self._scales = rounded_weight(conv.weight.detach().float())
        self._rows, columns = conv.padding
        # `quantised` adds the rows of zeros while it rounds x.
        self._geometry = ([1, 1], [0, columns], [1, 1], conv.groups)
        self._weight = torch.ops.onednn.qconv_prepack(
            rounded, self._scales, 1.0, 0, *self._geometry, [1, conv.in_channels, *TYPICAL_SIZE]
        )
        self._zeros = torch.zeros(len(self._scales), dtype=torch.int32)
        self._bias = None if conv.bias is None else conv.bias.detach().float()
        self._activation = "swish" if silu else "none"

    def __call__(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        edges = (self._rows, self._rows) if edges is None else edges
        results = [self._convolve(image, edges) for image in torch.split(x, 1)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _convolve(self, x: Tensor, edges: Edges) -> Tensor:
        """Convolves one image or strip [1, C, H, W]; returns NaN everywhere if any value is not finite."""
        low, high = (
            float(bound) for bound in torch.aminmax(pixel_rows(x))
        )  # of the rows, because aminmax copies x first
        scale = (max(high, 0.0) - min(low, 0.0)) / _LEVELS or 1.0
        finite = abs(scale) < float("inf")  # false for NaN too
        zero = round(-min(low, 0.0) / scale) if finite else 0
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            quantised(x if finite else torch.zeros_like(x), scale if finite else 1.0, zero, edges),
            scale if finite else float("nan"),
            zero,
            self._weight,
            self._scales,
            self._zeros,
            self._bias,
            *self._geometry,
            1.0,
            0,
            x.dtype,
            self._activation,
            [],
            "",
        )
        return y


def rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns round(weight / scale) of weight [out, ...] as int8, and the scales [out]."""
    scales = weight.flatten(1).abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scales.view(-1, *(1 for _ in weight.shape[1:]))).round_().to(torch.int8), scales


def quantised(x: Tensor, scale: float, zero: int, edges: Edges) -> Tensor:
    """Returns round(x / scale) + zero as uint8 [1, C, H + edges, W] of x [1, C, H, W], with rows of `zero` around it.

    Works in slices, so that the fp32 intermediates stay in the cache.
    """
    _, channels, height, width = x.shape
    above, below = edges
    size = (1, channels, height + above + below, width)
    out = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last)
    rows = pixel_rows(out)
    first, last = above * width, (above + height) * width
    rows[:first].fill_(zero)
    rows[last:].fill_(zero)
    offset = torch.tensor(ROUNDING_OFFSET + zero)
    for source, target in cache_sized_slices(pixel_rows(x), rows[first:last]):
        target.copy_(torch.add(offset, source.float(), alpha=1 / scale).view(torch.int32))  # uint8 keeps the low byte
    return out
