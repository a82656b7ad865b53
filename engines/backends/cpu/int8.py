"""Convolutions in 8 bits on a CPU with VNNI: twice the rate of bf16, at about 39 dB each.

Weights are rounded once, with a scale per output channel. Activations are rounded at every call with a scale and a zero
of their own per picture, so that no calibration is needed and a picture does not depend on its batch. Sums are exact
(int32), bias and SiLU are applied to them in fp32 inside the kernel. The operators are those that torch.compile's CPU
backend calls for quantised models (torch/_inductor/fx_passes/quantization.py).

Shapes: [B, C, H, W], channels-last in memory.
"""

import torch
from torch import Tensor, nn

from engines.backends.cpu.convolution import TYPICAL_SIZE, Edges, cache_sized_slices, pixel_rows

_LEVELS = 254  # of 256: the zero is rounded, which may shift the range by half a level
_ROUNDING_OFFSET = (
    1.5 * 2**23
)  # added to a small number in fp32, leaves it rounded in the lowest bits: fp32 has 24 of them


def has_int8() -> bool:
    """Whether this CPU multiplies 8-bit numbers without overflow in between, and torch has the operators."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # type: ignore[no-untyped-call]  # torch's own


class Int8Conv:
    """A convolution of stride 1 as `engines.backends.cpu.convolution.PackedConv`, computed in 8 bits."""

    def __init__(self, conv: nn.Conv2d, *, silu: bool = False) -> None:
        assert not isinstance(conv.padding, str)
        weight = conv.weight.detach().float()
        self._scales = weight.abs().amax((1, 2, 3)).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / self._scales[:, None, None, None]).round().to(torch.int8)
        self._rows, columns = conv.padding
        # Rows of zeros are added where x is rounded anyway.
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
        """One picture or strip [1, C, H, W]. What is not finite comes out as NaN everywhere."""
        low, high = (float(bound) for bound in torch.aminmax(pixel_rows(x)))  # of x itself it makes a copy first
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


def quantised(x: Tensor, scale: float, zero: int, edges: Edges) -> Tensor:
    """round(x / scale) + zero as uint8 [1, C, H + edges, W] of x [1, C, H, W], with rows of 0 around it.

    By slices, so that fp32 stays in the cache.
    """
    _, channels, height, width = x.shape
    above, below = edges
    size = (1, channels, height + above + below, width)
    out = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last)
    rows = pixel_rows(out)
    first, last = above * width, (above + height) * width
    rows[:first].fill_(zero)
    rows[last:].fill_(zero)
    rounder = torch.tensor(_ROUNDING_OFFSET + zero)
    for source, results in cache_sized_slices(pixel_rows(x), rows[first:last]):
        results.copy_(torch.add(rounder, source.float(), alpha=1 / scale).view(torch.int32))  # of which a byte is kept
    return out
