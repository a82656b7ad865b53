"""Steps of the decoder on a CPU by oneDNN's convolutions: in bf16 or fp32, in 8 bits, or by Winograd's filtering.

- Weights are packed once, not at every call, and oneDNN applies SiLU inside the convolution.
- Upsampling is folded (engines.models.folding).
- Steps run strip by strip (engines.backends.cpu.convolution) and add to the image in place.

Shapes: [B, C, H, W], channels-last in memory; an image has B = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.convolution import (
    ConvFactory,
    PackedConv,
    RowStrip,
    cache_sized_slices,
    make_conv,
    split_into_strips,
    update_in_strips,
)
from engines.backends.cpu.int8 import Int8Conv
from engines.backends.cpu.kernels.layout import Edges, pixel_rows
from engines.backends.cpu.steps import Attend, Norm, Step, attend_in_slices
from engines.backends.cpu.winograd import WinogradConv
from engines.models.dcae import ResBlock, Upsample
from engines.models.folding import folded_kernel, phases_of, shortcuts_of
from engines.models.layers import GLUMBConv


class Gate(Protocol):
    """A depthwise convolution and its first half times the SiLU of its second: [1, 2C, H, W] to [1, C, h, W]."""

    def __call__(self, x: Tensor, edges: Edges) -> Tensor: ...


class PackedGate:
    """Gate by oneDNN's convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = PackedConv(conv)

    def __call__(self, x: Tensor, edges: Edges) -> Tensor:
        return _gated(self._conv(x, edges))


@dataclass(frozen=True)
class OneDnnSteps:
    """Builds steps (engines.backends.cpu.steps.Steps) from two kinds of convolutions."""

    conv3x3: ConvFactory  # of ResBlocks
    other: ConvFactory  # of gated blocks and of upsampling
    exact_shortcut: bool  # weights hold a shortcut's 1 exactly, beside small weights
    gate: Callable[[nn.Conv2d], Gate] = PackedGate
    attention: Callable[[int], Attend] = lambda _: attend_in_slices  # for heads of d

    def computes(self, block: ResBlock | Upsample) -> bool:
        """Returns whether these differ from DIRECT in a block."""
        return isinstance(block, ResBlock) or self.conv3x3 is self.other

    def res_block(self, block: ResBlock) -> Step:
        return _ResBlock(block, self.conv3x3)

    def upsample(self, upsample: Upsample) -> Step:
        return _Upsample(upsample, self.other, self.exact_shortcut)

    def gated(self, block: GLUMBConv) -> Step:
        return _GatedConv(block, self.other, self.gate)

    def attend(self, head_dim: int) -> Attend:
        return self.attention(head_dim)


DIRECT = OneDnnSteps(PackedConv, PackedConv, exact_shortcut=True)
BY_ROWS = OneDnnSteps(WinogradConv, PackedConv, exact_shortcut=True)
# Int8Conv for 3x3 too: Winograd's sums of rows would need more than 8 bits.
IN_8_BITS = OneDnnSteps(Int8Conv, Int8Conv, exact_shortcut=False)


class _ResBlock:
    def __init__(self, block: ResBlock, conv3x3: ConvFactory) -> None:
        self._first, self._second = conv3x3(block.conv1, silu=True), conv3x3(block.conv2)
        self._norm = Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        return update_in_strips(x, x.shape[1], self._read, self._write)

    def _read(self, image: Tensor, strip: RowStrip) -> Tensor:
        return self._first(strip.with_neighbours().view(image), strip.edges)

    def _write(self, image: Tensor, strip: RowStrip, y: Tensor) -> None:
        self._norm.add(strip.view(image), self._second(y, strip.edges))


class _GatedConv:
    def __init__(self, block: GLUMBConv, other: ConvFactory, gate: Callable[[nn.Conv2d], Gate]) -> None:
        assert block.norm is not None
        self._hidden = block.conv_inverted.out_channels
        self._widen, self._gate = other(block.conv_inverted, silu=True), gate(block.conv_depth)
        self._narrow, self._norm = other(block.conv_point), Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        return update_in_strips(x, self._hidden, self._read, self._write)

    def _read(self, image: Tensor, strip: RowStrip) -> Tensor:
        return self._widen(strip.view(image))

    def _write(self, image: Tensor, strip: RowStrip, y: Tensor) -> None:
        self._norm.add(strip.view(image), self._narrow(self._gate(y, strip.edges)))


def _gated(x: Tensor) -> Tensor:
    """Returns the first half of the channels times the SiLU of the second half."""
    value, gate = (half.permute(0, 2, 3, 1).flatten(0, 2) for half in x.chunk(2, dim=1))
    gated = torch.empty((1, value.shape[1], *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    for out, value_rows, gate_rows in cache_sized_slices(pixel_rows(gated), value, gate):
        torch.mul(value_rows, F.silu(gate_rows), out=out)
    return gated


class _Upsample:
    def __init__(self, upsample: Upsample, other: ConvFactory, exact_shortcut: bool) -> None:
        # Folded into float weights, the shortcut costs nothing. In 8 bits its 1 would set the channel's scale and
        # leave little precision to the other weights, so the shortcut is added separately.
        self._repeats = 0 if exact_shortcut else upsample.repeats
        weight, bias = folded_kernel(upsample, shortcut=not self._repeats)
        self._conv, self._channels = other(make_conv(weight, bias, padding=1)), len(weight) // 4

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        size = (batch, self._channels, 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        for image, output in zip(torch.split(x, 1), torch.split(out, 1), strict=True):
            for strip in split_into_strips(image, max(image.shape[1], 4 * self._channels)):
                self._upsample_strip(image, strip, output[:, :, 2 * strip.start : 2 * strip.stop])
        return out

    def _upsample_strip(self, image: Tensor, strip: RowStrip, out: Tensor) -> None:
        y = self._conv(strip.with_neighbours().view(image), strip.edges)
        phases = phases_of(y, strip.stop - strip.start, image.shape[3])
        targets = [out[:, :, phase // 2 :: 2, phase % 2 :: 2] for phase in range(4)]
        if self._repeats:
            shortcuts = shortcuts_of(strip.view(image), self._repeats)
            for target, part, shortcut in zip(targets, phases, shortcuts, strict=True):
                torch.add(part, shortcut, out=target)
        else:
            for target, part in zip(targets, phases, strict=True):
                target.copy_(part)
