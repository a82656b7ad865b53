"""3x3 convolutions on a CPU as six 1x3 convolutions for every four rows, which halves the products.

This is Winograd's minimal filtering F(4, 3) along the rows alone (Lavin and Gray, Fast Algorithms for Convolutional
Neural Networks, section 4.3). Six rows d0..d5 of the image, and the three of the kernel, are polynomials
evaluated at 0, a, -a, b, -b and infinity. Each of the six products is a convolution along the columns; four rows of
the result are combined from them.

The points a = 3/2 and b = 2/3 lose 3 dB less in bf16 than the usual 1 and 2, and a * b = 1 saves factors. F(2, 3) in
both directions would save about as many products for twice the sums, each of which is a pass over memory.

Shapes: [B, C, H, W], channels-last in memory.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.convolution import pack_weight
from engines.backends.cpu.kernels.layout import Edges
from engines.backends.cpu.kernels.winograd_4x4 import A, B, at_points

_ROWS_AT_ONCE = 4  # rows of the result
_PADDING = [0, 1]  # of a 1x3 convolution
_GEOMETRY = (_PADDING, [1, 1], [1, 1], 1)  # and its stride, dilation and groups


class WinogradConv:
    """Conv of 3x3 kernels, stride 1 and padding 1, as engines.backends.cpu.convolution.PackedConv."""

    def __init__(self, conv: nn.Conv2d, *, silu: bool = False) -> None:
        weight = conv.weight.detach()
        self._at_0, *self._at_points, self._at_infinity = (
            pack_weight(kernel.unsqueeze(2).to(weight.dtype).contiguous(), _PADDING)
            for kernel in at_points(weight.float(), 2)
        )
        self._bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        self._silu = silu

    def __call__(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        above, below = (1, 1) if edges is None else edges
        height = x.shape[2] + above + below - 2
        below += -height % _ROWS_AT_ONCE
        if above or below:
            x = F.pad(x, (0, 0, above, below))
        size = (x.shape[0], len(self._bias), height, x.shape[3])
        output = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        for index, rows in enumerate(self._rows(x)):
            target = output[:, :, index::_ROWS_AT_ONCE]
            valid = rows[:, :, : target.shape[2]]
            torch.ops.aten.silu.out(valid, out=target) if self._silu else target.copy_(valid)
        return output

    def _rows(self, x: Tensor) -> Iterator[Tensor]:
        """Yields rows 0, 4, 8... of the result, then rows 1, 5, 9..., and so on; x has one more row above and below."""
        d0, d1, d2, d3 = (x[:, :, first:-2:_ROWS_AT_ONCE] for first in range(_ROWS_AT_ONCE))
        d4, d5 = x[:, :, 4::_ROWS_AT_ONCE], x[:, :, 5::_ROWS_AT_ONCE]
        inner = (d1, d2, d3, d4)
        sum_a, difference_a = self._at_pair(inner, A, B, self._at_points[:2])
        sum_b, difference_b = self._at_pair(inner, B, A, self._at_points[2:])
        bias = self._bias.view(1, -1, 1, 1)
        both = A**2 + B**2
        yield self._add_product(sum_a + sum_b, torch.sub(d4, d2, alpha=both).add_(d0), self._at_0)
        yield torch.add(bias, difference_a, alpha=A).add_(difference_b, alpha=B)
        yield torch.add(bias, sum_a, alpha=A**2).add_(sum_b, alpha=B**2)
        cubes = difference_a.mul_(A**3).add_(difference_b, alpha=B**3)
        yield self._add_product(cubes, torch.sub(d5, d3, alpha=both).add_(d1), self._at_infinity)

    def _at_pair(
        self, inner: tuple[Tensor, ...], point: float, other: float, kernels: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns sum and difference of the products at a point and at its negative."""
        d1, d2, d3, d4 = inner
        even, odd = torch.sub(d4, d2, alpha=other**2), torch.sub(d3, d1, alpha=other**2)
        at_plus, at_minus = torch.add(even, odd, alpha=point), even.sub_(odd, alpha=point)
        plus, minus = (
            torch.ops.mkldnn._convolution_pointwise(rows, kernel, None, *_GEOMETRY, "none", [], "")
            for rows, kernel in zip((at_plus, at_minus), kernels, strict=True)
        )
        return plus + minus, plus.sub_(minus)

    def _add_product(self, others: Tensor, rows: Tensor, kernel: Tensor) -> Tensor:
        """Returns the product plus `others`, the sum over the other points, plus the bias."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            rows, others, kernel, self._bias, *_GEOMETRY, "add", 1.0, None, [], ""
        )
        return y
