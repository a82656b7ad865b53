"""Folds the decoder's nearest upsampling and 3x3 convolution into one 2x2 convolution at the low resolution, exactly.

A 3x3 window on an image with doubled pixels covers only 2x2 distinct pixels. The parity of the result's row and column
decides which taps coincide. This gives four 2x2 kernels with interleaved results and 16/36 of the multiplications. The
repeating shortcut adds one channel of the source pixel to each result: a 1 in the same kernels, at no cost.
Upsampling by pixel shuffle gains only the folded shortcut.

Shapes: C channels in, D out; phase p = 2 * (odd row) + (odd column).
"""

import torch
from torch import Tensor, nn

from engines.models.dcae import Decoder, Upsample

# By the parity of a row: the taps on the earlier and on the later of the two pixels in its window.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))


def folded_kernel(upsample: Upsample, *, shortcut: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns weight [4D, C, k, k], ordered by phase, then channel, and bias [4D]; k is 2, or 3 for a pixel shuffle.

    shortcut=False omits the shortcut, for weights too coarse to hold a 1; `shortcuts_of` returns what to add.
    """
    weight = upsample.conv.weight  # taps are summed in higher precision
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
    """Returns the four phases [B, D, H, W] of the folded convolution's result [B, 4D, H or H+1, W or W+1]."""
    shift = y.shape[2] - height  # 1 for two taps: an odd row reads its pixel and the next
    parts = y.chunk(4, dim=1)
    return [
        parts[p][:, :, shift * (p // 2) : shift * (p // 2) + height, shift * (p % 2) : shift * (p % 2) + width]
        for p in range(4)
    ]


def shortcuts_of(x: Tensor, repeats: int) -> list[Tensor]:
    """Returns the shortcut of each phase: four views [B, D, H, W] of x [B, C, H, W]."""
    return [x[:, phase // repeats :: 4 // repeats] for phase in range(4)]


class FoldedUpsample(nn.Module):
    """Computes dcae.Upsample with a folded kernel: [B, C, H, W] -> [B, D, 2H, 2W]."""

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
    """Folds the upsampling of a loaded decoder in place; its state dict no longer matches upstream's."""
    for path, part in list(decoder.named_modules()):
        if isinstance(part, Upsample):
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, FoldedUpsample(part))
    return decoder
