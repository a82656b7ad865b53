"""Convolutions as oneDNN wants them, over a picture or over strips of its rows; what walks over such strips.

A strip is as many rows as a core's share of the last cache holds, and what lies between two convolutions of a block is
made for one strip at a time: it is read where it was just written, and its memory, small enough for malloc to keep, is
used again for the next strip instead of being asked of the system page by page.

The operators are those that torch.compile's CPU backend calls (torch/_inductor/fx_passes/mkldnn_fusion.py).

Shapes: [B, C, H, W], channels-last in memory; a picture has B = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TYPICAL_SIZE = (
    64,
    64,
)  # the layout of weights is chosen for a picture, and fits others; chosen for none, 1x1 is 8x slower
_SLICE_NUMEL = 2**19  # numbers in one slice: 2 MiB in fp32, the L2 caches of two cores
STRIP_NUMEL = 2**23  # numbers in one strip: 16 MiB in bf16

Edges = tuple[int, int]  # rows of zeros above and below what is given


class Conv(Protocol):
    """A convolution of stride 1 from [B, C, H, W] to [B, D, H, W].

    `edges` says how many rows of zeros lie above and below `x`; by default as many as the convolution pads with. Fewer
    where `x` is a strip that comes with its neighbours.
    """

    def __call__(self, x: Tensor, edges: Edges | None = None) -> Tensor: ...


class ConvFactory(Protocol):
    """Makes what computes a convolution of stride 1, with SiLU behind it where asked for."""

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Conv: ...


class PackedConv:
    """A convolution of stride 1 over weights that are laid out for oneDNN, with SiLU behind it where asked for."""

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
    """Weights [D, C / groups, k, l] of a convolution of stride 1, laid out for oneDNN."""
    size = [1, groups * weight.shape[1], *TYPICAL_SIZE]
    made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], groups, size)
    return made


def make_conv(weight: Tensor, bias: Tensor | None, padding: int = 0) -> nn.Conv2d:
    """A convolution over these weights [D, C, k, k] themselves."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, padding=padding, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return conv


def pixel_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B*H*W, C]: one row a pixel, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def cache_sized_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all `tensors` at once, as many as fit a cache."""
    step = max(1, _SLICE_NUMEL // tensors[0].shape[1])
    yield from zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)


@dataclass(frozen=True)
class RowStrip:
    """Rows `start` to `stop` of a picture of so many rows."""

    start: int
    stop: int
    height: int

    @property
    def edges(self) -> Edges:
        """For a kernel of three rows that makes this strip from the strip and its neighbours."""
        return int(self.start == 0), int(self.stop == self.height)

    def with_neighbours(self) -> "RowStrip":
        """With the row above and the row below, where there are any."""
        return RowStrip(max(self.start - 1, 0), min(self.stop + 1, self.height), self.height)

    def view(self, image: Tensor) -> Tensor:
        """These rows [1, C, h, W], a view. Its strides are those of a picture of its own, which oneDNN looks at."""
        _, channels, _, width = image.shape
        rows = pixel_rows(image)[self.start * width : self.stop * width]
        return rows.view(1, -1, width, channels).permute(0, 3, 1, 2)


def split_into_strips(image: Tensor, max_channels: int) -> list[RowStrip]:
    """All rows of a picture, as many at once as hold some millions of numbers at so many channels, the most on the way.

    Fours of them, as engines.backends.cpu.winograd makes them.
    """
    height, width = image.shape[2:]
    step = max(1, STRIP_NUMEL // (max_channels * width) // 4) * 4
    return [RowStrip(start, min(start + step, height), height) for start in range(0, height, step)]


ReadRows = Callable[[Tensor, RowStrip], Tensor]
WriteStrip = Callable[[Tensor, RowStrip, Tensor], None]


def update_in_strips(x: Tensor, max_channels: int, read: ReadRows, write: WriteStrip) -> Tensor:
    """x, changed in place strip by strip by way of another tensor, of which each row is made once.

    read(picture, rows) makes rows of that tensor, for which it looks at the picture's and one more on each side;
    write(picture, strip, y) changes a strip, given that strip of the tensor with its neighbours. No row is looked at
    once it is written.
    """
    for image in torch.split(x, 1):
        parts: list[Tensor] = []
        made = 0
        for strip in split_into_strips(image, max_channels):
            rows = RowStrip(made, strip.with_neighbours().stop, strip.height)
            if rows.start < rows.stop:
                parts.append(read(image, rows))
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            parts = [y[:, :, -2:].clone(memory_format=torch.channels_last)]  # the next strip's neighbour and first row
            write(image, strip, y)
            made = rows.stop
    return x
