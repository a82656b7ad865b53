"""The decoder on a CPU: weights in the layout of its kernels, and few passes over memory between them.

- Steps come from engines.backends.cpu.onednn_steps or tiled_steps, whichever is faster (fastest_steps).
- All tensors are channels-last, so a norm over channels needs no transposition.

Shapes: [B, C, H, W], channels-last in memory; an image has B = 1.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from engines.backends.cpu.convolution import PackedConv, cache_sized_slices, make_conv
from engines.backends.cpu.kernels.layout import pixel_rows
from engines.backends.cpu.onednn_steps import BY_ROWS
from engines.backends.cpu.steps import Attend, Norm, Step
from engines.models.dcae import (
    Decoder,
    EfficientViTBlock,
    MultiscaleLinearAttention,
    ResBlock,
    Upsample,
    attend,
)
from engines.models.layers import GLUMBConv


class AllSteps(Protocol):
    """Builds a step from each kind of block that is mostly convolutions."""

    def res_block(self, block: ResBlock) -> Step: ...

    def upsample(self, upsample: Upsample) -> Step: ...

    def gated(self, block: GLUMBConv) -> Step: ...

    def attend(self, head_dim: int) -> Attend: ...


class _Attention:
    def __init__(self, attention: MultiscaleLinearAttention, attend_linearly: Attend) -> None:
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        self._project = PackedConv(make_conv(torch.cat(weights)[:, :, None, None], None))
        self._scales = [
            [PackedConv(_as_conv2d(scale.get_submodule(name))) for name in ("proj_in", "proj_out")]
            for scale in attention.to_qkv_multiscale
        ]
        self._head_dim, self._attend_linearly = attention.head_dim, attend_linearly
        self._out = PackedConv(make_conv(attention.to_out.weight[:, :, None, None], None))
        self._norm = Norm(attention.norm_out)

    def __call__(self, x: Tensor) -> Tensor:
        projected = self._project(x)
        scales = [projected, *(last(first(projected)) for first, last in self._scales)]
        self._norm.add(x, self._out(self._attend_scales(scales)))
        return x

    def _attend_scales(self, scales: list[Tensor]) -> Tensor:
        """Attends within each of S scales: queries, keys and values [B, 3C, H, W] each to [B, C*S, H, W]."""
        batch, channels, height, width = scales[0].shape
        if height * width <= self._head_dim:  # quadratic order, as MultiscaleLinearAttention
            return attend(torch.cat(scales, dim=1), self._head_dim).contiguous(memory_format=torch.channels_last)
        size = (batch, len(scales) * channels // 3, height, width)
        out = torch.empty(size, dtype=scales[0].dtype, memory_format=torch.channels_last)
        for index, target in enumerate(torch.split(out, 1)):
            parts = pixel_rows(target).chunk(len(scales), dim=1)
            for scale, part in zip(scales, parts, strict=True):
                projected = torch.unflatten(pixel_rows(scale[index : index + 1]), 1, (-1, 3, self._head_dim))
                query, key, value = projected.unbind(2)
                self._attend_linearly(query, key, value, torch.unflatten(part, 1, (-1, self._head_dim)))
        return out


class CpuDecoder(nn.Module):
    """Computes as dcae.Decoder.forward. Consumes a loaded `decoder` on the CPU, stage by stage; fp32 or bf16."""

    def __init__(self, decoder: Decoder, steps: AllSteps = BY_ROWS) -> None:
        super().__init__()
        self._repeats = decoder.repeats  # of the shortcut around the first convolution
        self._first = PackedConv(_as_conv2d(decoder.conv_in))
        self._steps = list[Step]()
        for index in reversed(range(len(decoder.up_blocks))):
            for block in _as_sequential(decoder.up_blocks[index]):
                self._steps += _steps(block, steps)
            decoder.up_blocks[index] = nn.Identity()  # frees its weights, of which steps hold copies
        self._norm, self._act = Norm(decoder.norm_out), decoder.act
        last = decoder.conv_out
        self._last = steps.upsample(last) if isinstance(last, Upsample) else PackedConv(_as_conv2d(last))

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


def _steps(block: nn.Module, steps: AllSteps) -> list[Step]:
    if isinstance(block, EfficientViTBlock):
        return [_Attention(block.attn, steps.attend(block.attn.head_dim)), steps.gated(block.conv_out)]
    if isinstance(block, Upsample):
        return [steps.upsample(block)]
    assert isinstance(block, ResBlock)
    return [steps.res_block(block)]
