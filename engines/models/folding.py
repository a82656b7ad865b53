"""Upsampling of the decoder with less arithmetic, exactly: nearest + 3x3 as one 2x2 convolution at the low resolution.

A 3x3 window on a picture whose pixels are doubled sees only 2x2 different ones, and which of its taps fall together
depends on whether row and column of the result are even or odd: four 2x2 kernels, whose results are interleaved. That
is 16/36 of the multiplications. The repeating shortcut adds to each result one channel of the pixel that it grew from,
so it is a 1 in the same kernels and is never made. Upsampling by pixel shuffle gains the shortcut alone.

Shapes: C channels in, D out; phase p = 2 * (odd row) + (odd column).
"""

import torch
from torch import Tensor, nn

from engines.models.dcae import Decoder, Upsample

# By the parity of a row: which of the three taps fall on the earlier and on the later of the two pixels that it sees.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))


def folded_kernel(upsample: Upsample, *, shortcut: bool = True) -> tuple[Tensor, Tensor | None]:
    """Weight [4D, C, k, k], ordered by phase and then by channel, and bias [4D]; k is 2, or 3 for a pixel shuffle.

    shortcut False leaves it out, for weights that are rounded too coarsely to hold a 1 (`shortcuts_of` adds it).
    """
    weight = upsample.conv.weight  # summed in a precision higher than its own
    weight = weight.double() if weight.dtype in (torch.float32, torch.float64) else weight.float()
    bias = upsample.conv.bias
    if upsample.interpolate:
        rows = [torch.stack([weight[:, :, list(taps)].sum(2) for taps in parity], dim=2) for parity in _TAPS]
        phases = [
            torch.stack([row[:, :, :, list(taps)].sum(3) for taps in parity], dim=3) for row in rows for parity in _TAPS
        ]
        kernel = torch.stack(phases)  # [4, D, C, 2, 2]
        bias = None if bias is None else bias.repeat(4)
    else:
        kernel = torch.unflatten(weight, 0, (-1, 4)).transpose(0, 1).contiguous()
        bias = None if bias is None else torch.unflatten(bias, 0, (-1, 4)).t().reshape(-1)
    if upsample.repeats and shortcut:
        out = torch.arange(kernel.shape[1], device=kernel.device)
        for phase in range(4):
            row, column = (1 - phase // 2, 1 - phase % 2) if upsample.interpolate else (1, 1)
            kernel[phase, out, (4 * out + phase) // upsample.repeats, row, column] += 1
    return kernel.flatten(0, 1).to(upsample.conv.weight.dtype), bias


def phases_of(y: Tensor, height: int, width: int) -> list[Tensor]:
    """The four [B, D, H, W] of the folded convolution's result [B, 4D, H or H+1, W or W+1], by phase."""
    shift = y.shape[2] - height  # 1 where the kernel has two taps: an odd row sees its pixel and the next
    parts = y.chunk(4, dim=1)
    return [
        parts[p][:, :, shift * (p // 2) : shift * (p // 2) + height, shift * (p % 2) : shift * (p % 2) + width]
        for p in range(4)
    ]


def shortcuts_of(x: Tensor, repeats: int) -> list[Tensor]:
    """What a shortcut of so many `repeats` adds to each phase: four views [B, D, H, W] of x [B, C, H, W]."""
    return [x[:, phase // repeats :: 4 // repeats] for phase in range(4)]


class FoldedUpsample(nn.Module):
    """As dcae.Upsample: [B, C, H, W] -> [B, D, 2H, 2W]."""

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        weight, bias = folded_kernel(upsample)
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=1, device="meta")
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        phases = torch.stack(phases_of(self.conv(x), height, width), dim=2)  # [B, D, 4, H, W]
        return nn.functional.pixel_shuffle(phases.flatten(1, 2), 2)


def fold(decoder: Decoder) -> Decoder:
    """Puts folded upsampling into a loaded decoder, in place; its state dict is upstream's no longer."""
    for path, part in list(decoder.named_modules()):
        if isinstance(part, Upsample):
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, FoldedUpsample(part))
    return decoder
