"""The decoder on a CPU, with convolutions by oneDNN and few passes over memory between them.

- Weights are packed once, not at every call.
- oneDNN applies SiLU inside the convolution.
- Upsampling is folded (engines.models.folding).
- 3x3 convolutions need half of the products (engines.backends.cpu.winograd).
- Blocks run strip by strip (engines.backends.cpu.convolution) and add to the image in place.
- Norm and attention run in slices, so that their fp32 intermediates stay in the cache.
- All tensors are channels-last, so a norm over channels needs no transposition.

Shapes: [B, C, H, W], channels-last in memory; an image has B = 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.convolution import (
    ConvFactory,
    PackedConv,
    RowStrip,
    cache_sized_slices,
    make_conv,
    pixel_rows,
    split_into_strips,
    update_in_strips,
)
from engines.backends.cpu.int8 import Int8Conv
from engines.backends.cpu.winograd import WinogradConv
from engines.models.dcae import ATTENTION_EPS, Decoder, EfficientViTBlock, MultiscaleLinearAttention, ResBlock, Upsample
from engines.models.folding import folded_kernel, phases_of, shortcuts_of
from engines.models.layers import GLUMBConv, RMSNorm


@dataclass(frozen=True)
class WideConvolutions:
    """Factories of the wide convolutions: 3x3 in ResBlocks, and the others, in gated blocks and upsampling."""

    conv3x3: ConvFactory
    other: ConvFactory
    exact_shortcut: bool  # weights hold a shortcut's 1 exactly, beside small weights


FLOAT_CONVOLUTIONS = WideConvolutions(WinogradConv, PackedConv, exact_shortcut=True)
# Int8Conv for 3x3 too: Winograd's sums of rows would need more than 8 bits.
INT8_CONVOLUTIONS = WideConvolutions(Int8Conv, Int8Conv, exact_shortcut=False)


class _Norm:
    """RMSNorm of rows [N, C], in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        assert norm.bias is not None
        self._eps, self._weight, self._bias = norm.eps, norm.weight.float(), norm.bias.float()

    def __call__(self, rows: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
        scale = size.square_().mul_(1 / rows.shape[1]).add_(self._eps).rsqrt_()
        return torch.addcmul(self._bias, rows.float().mul_(scale), self._weight)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds norm(y) to x, in place."""
        for target, rows in cache_sized_slices(pixel_rows(x), pixel_rows(y)):
            target.add_(self(rows))


class _ResBlock:
    def __init__(self, block: ResBlock, convolutions: WideConvolutions) -> None:
        self._first, self._second = convolutions.conv3x3(block.conv1, silu=True), convolutions.conv3x3(block.conv2)
        self._norm = _Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        return update_in_strips(x, x.shape[1], self._read, self._write)

    def _read(self, image: Tensor, strip: RowStrip) -> Tensor:
        return self._first(strip.with_neighbours().view(image), strip.edges)

    def _write(self, image: Tensor, strip: RowStrip, y: Tensor) -> None:
        self._norm.add(strip.view(image), self._second(y, strip.edges))


class _Attention:
    def __init__(self, attention: MultiscaleLinearAttention) -> None:
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        self._project = PackedConv(make_conv(torch.cat(weights)[:, :, None, None], None))
        self._scales = [
            [PackedConv(_as_conv2d(scale.get_submodule(name))) for name in ("proj_in", "proj_out")]
            for scale in attention.to_qkv_multiscale
        ]
        self._head_dim, self._attend_quadratic = attention.head_dim, attention.attend
        self._out = PackedConv(make_conv(attention.to_out.weight[:, :, None, None], None))
        self._norm = _Norm(attention.norm_out)

    def __call__(self, x: Tensor) -> Tensor:
        projected = self._project(x)
        scales = [projected, *(last(first(projected)) for first, last in self._scales)]
        self._norm.add(x, self._out(self._attend_scales(scales)))
        return x

    def _attend_scales(self, scales: list[Tensor]) -> Tensor:
        """Attends within each of S scales: queries, keys and values [B, 3C, H, W] each to [B, C*S, H, W]."""
        batch, channels, height, width = scales[0].shape
        if height * width <= self._head_dim:  # quadratic order, as MultiscaleLinearAttention
            return self._attend_quadratic(torch.cat(scales, dim=1)).contiguous(memory_format=torch.channels_last)
        size = (batch, len(scales) * channels // 3, height, width)
        out = torch.empty(size, dtype=scales[0].dtype, memory_format=torch.channels_last)
        for index, target in enumerate(torch.split(out, 1)):
            parts = pixel_rows(target).chunk(len(scales), dim=1)
            for scale, part in zip(scales, parts, strict=True):
                _attend(pixel_rows(scale[index : index + 1]), part, self._head_dim)
        return out


def _attend(rows: Tensor, out: Tensor, head_dim: int) -> None:
    """Writes linear attention over the pixels of one image to `out` [N, C], as MultiscaleLinearAttention.attend.

    rows [N, 3C]: each run of 3 * head_dim channels is a query, a key and a value. Computes in fp32.
    """
    heads = rows.shape[1] // (3 * head_dim)
    context, total = torch.zeros(heads, head_dim, head_dim), torch.zeros(heads, head_dim, 1)
    for (part,) in cache_sized_slices(rows):
        _, key, value = torch.split(_heads(part, heads), head_dim, dim=2)
        key = F.relu(key.float())
        context.baddbmm_(key.transpose(1, 2), value.float())
        total += key.sum(1).unsqueeze(2)
    for part, target in cache_sized_slices(rows, out):
        query = F.relu(_heads(part, heads)[..., :head_dim].float())
        _heads(target, heads).copy_((query @ context).div_(query @ total + ATTENTION_EPS))


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Views [n, heads * c] as [heads, n, c]."""
    return torch.unflatten(rows, 1, (heads, -1)).transpose(0, 1)


class _GatedConv:
    def __init__(self, block: GLUMBConv, convolutions: WideConvolutions) -> None:
        assert block.norm is not None
        self._hidden = block.conv_inverted.out_channels
        self._widen, self._depth = convolutions.other(block.conv_inverted, silu=True), PackedConv(block.conv_depth)
        self._narrow, self._norm = convolutions.other(block.conv_point), _Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        return update_in_strips(x, self._hidden, self._read, self._write)

    def _read(self, image: Tensor, strip: RowStrip) -> Tensor:
        return self._widen(strip.view(image))

    def _write(self, image: Tensor, strip: RowStrip, y: Tensor) -> None:
        self._norm.add(strip.view(image), self._narrow(_gated(self._depth(y, strip.edges))))


def _gated(x: Tensor) -> Tensor:
    """Returns the first half of the channels times the SiLU of the second half."""
    value, gate = (half.permute(0, 2, 3, 1).flatten(0, 2) for half in x.chunk(2, dim=1))
    gated = torch.empty((1, value.shape[1], *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    for out, value_rows, gate_rows in cache_sized_slices(pixel_rows(gated), value, gate):
        torch.mul(value_rows, F.silu(gate_rows), out=out)
    return gated


class _Upsample:
    def __init__(self, upsample: Upsample, convolutions: WideConvolutions) -> None:
        # Folded into float weights, the shortcut costs nothing. In 8 bits its 1 would set the channel's scale and
        # leave little precision to the other weights, so the shortcut is added separately.
        self._repeats = 0 if convolutions.exact_shortcut else upsample.repeats
        weight, bias = folded_kernel(upsample, shortcut=not self._repeats)
        self._conv, self._channels = convolutions.other(make_conv(weight, bias, padding=1)), len(weight) // 4

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


class CpuDecoder(nn.Module):
    """Computes as dcae.Decoder.forward. Copies the weights of a loaded `decoder` on the CPU; fp32 or bf16."""

    def __init__(self, decoder: Decoder, convolutions: WideConvolutions = FLOAT_CONVOLUTIONS) -> None:
        super().__init__()
        self._repeats = decoder.repeats  # of the shortcut around the first convolution
        self._first = PackedConv(_as_conv2d(decoder.conv_in))
        self._steps = [
            step
            for stage in reversed(decoder.up_blocks)
            for block in _as_sequential(stage)
            for step in _steps(block, convolutions)
        ]
        self._norm, self._act = _Norm(decoder.norm_out), decoder.act
        last = decoder.conv_out
        self._last = _Upsample(last, convolutions) if isinstance(last, Upsample) else PackedConv(_as_conv2d(last))

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.contiguous(memory_format=torch.channels_last)
        x = self._first(latent)
        if self._repeats:
            x += latent.repeat_interleave(self._repeats, dim=1)
        for step in self._steps:
            x = step(x)
        for (rows,) in cache_sized_slices(pixel_rows(x)):
            rows.copy_(self._act(self._norm(rows)))
        return self._last(x)


def _as_conv2d(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _as_sequential(module: nn.Module) -> nn.Sequential:
    assert isinstance(module, nn.Sequential)
    return module


def _steps(block: nn.Module, convolutions: WideConvolutions) -> list[_ResBlock | _Attention | _GatedConv | _Upsample]:
    if isinstance(block, EfficientViTBlock):
        return [_Attention(block.attn), _GatedConv(block.conv_out, convolutions)]
    if isinstance(block, Upsample):
        return [_Upsample(block, convolutions)]
    assert isinstance(block, ResBlock)
    return [_ResBlock(block, convolutions)]
