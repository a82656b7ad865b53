"""Convolutions by oneDNN over an image or over strips of its rows.

A strip has as many rows as fit a core's share of the last-level cache. A block computes the tensor between its two
convolutions one strip at a time, so it is read from the cache. Its memory is small enough for malloc to reuse; larger
blocks would be mapped by the system page by page.

The operators are those that torch.compile's CPU backend calls (torch/_inductor/fx_passes/mkldnn_fusion.py).

Shapes: [B, C, H, W], channels-last in memory; an image has B = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.kernels.layout import Edges, pixel_rows

# oneDNN chooses the layout of weights for an input size. It fits other sizes; without one, 1x1 is 8 times slower.
TYPICAL_SIZE = (64, 64)
_SLICE_NUMEL = 2**19  # numbers in one slice: 2 MiB in fp32, the L2 caches of two cores
STRIP_NUMEL = 2**23  # numbers in one strip: 16 MiB in bf16


class Conv(Protocol):
    """A convolution of stride 1 from [B, C, H, W] to [B, D, H, W].

    `edges`: rows of zeros to add above and below `x`; by default the convolution's padding. A strip that includes its
    neighbours needs fewer.
    """

    def __call__(self, x: Tensor, edges: Edges | None = None) -> Tensor: ...


class ConvFactory(Protocol):
    """Builds a Conv from a convolution of stride 1; with `silu` it applies SiLU to the result."""

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Conv: ...


class PackedConv:
    """Conv with weights packed for oneDNN."""

    def __init__(self, conv: nn.Conv2d, *, silu: bool = False) -> None:
        assert not isinstance(conv.padding, str)
        self._rows, self._columns = conv.padding
        self._groups = conv.groups
        self._activation = "swish" if silu else "none"
        self._bias = conv.bias
        self._weight = pack_weight(conv.weight, list(conv.padding), self._groups)

    def __call__(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        rows = self._rows
        if edges not in (None, (rows, rows)):
            rows, x = 0, F.pad(x, (0, 0, *edges)) if any(edges) else x
        ones = [1, 1]
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, [rows, self._columns], ones, ones, self._groups, self._activation, [], ""
        )
        return y


def pack_weight(weight: Tensor, padding: list[int], groups: int = 1) -> Tensor:
    """Returns the weights [D, C / groups, k, l] of a convolution of stride 1 in oneDNN's layout."""
    size = [1, groups * weight.shape[1], *TYPICAL_SIZE]
    reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], groups, size)
    return reordered


def make_conv(weight: Tensor, bias: Tensor | None, padding: int = 0) -> nn.Conv2d:
    """Returns a convolution that holds the weights [D, C, k, k] without a copy."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, padding=padding, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return conv


def cache_sized_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields slices of the rows of all `tensors`, as many rows as fit the L2 caches."""
    step = max(1, _SLICE_NUMEL // tensors[0].shape[1:].numel())
    yield from zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class RowStrip:
    """Rows `start` to `stop` of an image with `height` rows."""

    start: int
    stop: int
    height: int

    @property
    def edges(self) -> Edges:
        """Rows of zeros that a kernel of three rows needs around the strip with its neighbours."""
        return int(self.start == 0), int(self.stop == self.height)

    def with_neighbours(self) -> "RowStrip":
        """Adds the row above and the row below, where they exist."""
        return RowStrip(max(self.start - 1, 0), min(self.stop + 1, self.height), self.height)

    def view(self, image: Tensor) -> Tensor:
        """Views these rows of `image` as [1, C, h, W], with the strides of a separate image, which oneDNN checks."""
        _, channels, _, width = image.shape
        rows = pixel_rows(image)[self.start * width : self.stop * width]
        return rows.view(1, -1, width, channels).permute(0, 3, 1, 2)


def split_into_strips(image: Tensor, max_channels: int) -> list[RowStrip]:
    """Splits the rows of an image into strips of at most STRIP_NUMEL numbers at `max_channels` channels.

    Strips have a multiple of four rows, because engines.backends.cpu.winograd computes four at a time.
    """
    height, width = image.shape[2:]
    step = max(1, STRIP_NUMEL // (max_channels * width) // 4) * 4
    return [RowStrip(start, min(start + step, height), height) for start in range(0, height, step)]


ReadRows = Callable[[Tensor, RowStrip], Tensor]
WriteStrip = Callable[[Tensor, RowStrip, Tensor], None]


def update_in_strips(x: Tensor, max_channels: int, read: ReadRows, write: WriteStrip) -> Tensor:
    """Changes x in place, strip by strip, through an intermediate tensor whose rows are computed once.

    read(image, rows) returns those rows of the intermediate tensor; it reads the same rows of the image and one more on
    each side. write(image, strip, y) changes a strip; y is that strip of the intermediate tensor with its neighbours.
    No row is read after it is written.
    """
    for image in torch.split(x, 1):
        parts: list[Tensor] = []
        rows_read = 0
        for strip in split_into_strips(image, max_channels):
            rows = RowStrip(rows_read, strip.with_neighbours().stop, strip.height)
            if rows.start < rows.stop:
                parts.append(read(image, rows))
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            parts = [y[:, :, -2:].clone(memory_format=torch.channels_last)]  # neighbour and first row of the next strip
            write(image, strip, y)
            rows_read = rows.stop
    return x
