"""Steps of the decoder on a CPU in C: ResBlocks and upsampling by Winograd's filtering of 4x4 pixels, and gates.

A ResBlock is two calls for each strip of rows: convolution and SiLU, then convolution, norm and sum. Upsampling is one
call: the four phases of the folded kernel read the same tiles, and the shortcut is added while pixels are interleaved.

Shapes: [B, C, H, W], channels-last in memory; an image has B = 1.
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.convolution import RowStrip, split_into_strips
from engines.backends.cpu.kernels import gated_depthwise, linear_attention
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.linear_attention import LinearAttention
from engines.backends.cpu.kernels.winograd_4x4 import Norm, TiledConv
from engines.backends.cpu.onednn_steps import Gate, PackedGate
from engines.backends.cpu.steps import Attend, Step, attend_in_slices
from engines.models.dcae import ResBlock, Upsample
from engines.models.folding import folded_kernel

_MAX_UPSAMPLED = 512  # channels; weights of 1,024 to 1,024 would take 210 MB, for 1 % of a decoding
_REPEATS = (0, 2, 4)  # of a shortcut
_TILE = 4  # rows
_KEPT = _TILE + 1  # rows between two convolutions that the next strip reads again


class TiledSteps:
    """Builds steps (engines.backends.cpu.steps.Steps) from the C functions."""

    def __init__(self, library: Library) -> None:
        self._library, self._panel = library, library.panel

    def computes(self, block: ResBlock | Upsample) -> bool:
        if isinstance(block, ResBlock):
            return block.conv1.in_channels % self._panel == 0
        channels, out = block.conv.in_channels, block.conv.out_channels // (1 if block.interpolate else 4)
        fits = channels % self._panel == out % self._panel == 0 and channels <= _MAX_UPSAMPLED
        return fits and block.repeats in _REPEATS

    def res_block(self, block: ResBlock) -> Step:
        return _ResBlock(block, self._library)

    def upsample(self, upsample: Upsample) -> Step:
        return _Upsample(upsample, self._library)


def gate_factory(library: Library) -> Callable[[nn.Conv2d], Gate]:
    """Returns what builds the Gate of a convolution."""

    def gate(conv: nn.Conv2d) -> Gate:
        if gated_depthwise.computes(conv, library):
            return gated_depthwise.GatedDepthwise(library, conv, silu=False)
        return PackedGate(conv)

    return gate


def attention_factory(library: Library) -> Callable[[int], Attend]:
    """Returns what gives attention for heads of a width."""
    in_c = LinearAttention(library).write
    return lambda head_dim: in_c if linear_attention.computes(head_dim, library) else attend_in_slices


class _ResBlock:
    def __init__(self, block: ResBlock, library: Library) -> None:
        assert block.norm.bias is not None
        self._first = TiledConv(library, block.conv1.weight, block.conv1.bias, silu=True)
        self._second = TiledConv(library, block.conv2.weight, block.conv2.bias)
        self._norm = Norm(torch.stack([block.norm.weight, block.norm.bias]).float(), block.norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        for image in torch.split(x, 1):
            self._add_to(image)
        return x

    def _add_to(self, image: Tensor) -> None:
        """Changes the image strip by strip, each a tile behind the first convolution, which reads what is unchanged."""
        _, channels, height, width = image.shape
        strips = split_into_strips(image, channels)
        size = (1, channels, strips[0].stop + _KEPT, width)
        hidden = torch.empty(size, dtype=image.dtype, memory_format=torch.channels_last)
        kept = done = 0  # rows at the top of `hidden` that the strip before computed; rows of the image that are final
        for strip in strips:
            rows = RowStrip(strip.start - kept, strip.stop, height)  # of the image, which `hidden` has
            computed = _rows_of(hidden, kept, rows.stop - rows.start)
            self._first(strip.with_neighbours().view(image), computed, strip.edges)
            target = RowStrip(done, height if strip.stop == height else strip.stop - _TILE, height)
            if target.start < target.stop:
                read = target.with_neighbours()
                between = _rows_of(hidden, read.start - rows.start, read.stop - rows.start)
                self._second.add_norm(between, target.view(image), self._norm, target.edges)
            done = target.stop
            first = max(done - 1, 0) - rows.start
            kept = rows.stop - rows.start - first
            _move_rows(hidden, first, kept)


def _move_rows(x: Tensor, first: int, count: int) -> None:
    """Moves rows to the top. An operation of torch would leave its threads spinning beside those of the next call."""
    row = x.stride(2) * x.element_size()
    ctypes.memmove(x.data_ptr(), x.data_ptr() + first * row, count * row)


def _rows_of(x: Tensor, start: int, stop: int) -> Tensor:
    return RowStrip(start, stop, x.shape[2]).view(x)


class _Upsample:
    def __init__(self, upsample: Upsample, library: Library) -> None:
        weight, bias = folded_kernel(upsample, shortcut=False)
        self._channels, self._repeats = len(weight) // 4, upsample.repeats
        self._conv = TiledConv(library, _of_three_rows(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        size = (batch, self._channels, 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        for image, output in zip(torch.split(x, 1), torch.split(out, 1), strict=True):
            self._conv.upsample(image, output, self._repeats)
        return out


def _of_three_rows(kernels: Tensor) -> Tensor:
    """Returns folded kernels [4D, C, k, k] as [4D, C, 3, 3] about the pixel. Of k = 2, odd phases read the next one."""
    if kernels.shape[2] == 3:
        return kernels
    phases = [
        F.pad(part, (phase % 2, 1 - phase % 2, phase // 2, 1 - phase // 2))
        for phase, part in enumerate(kernels.chunk(4))
    ]
    return torch.cat(phases)
