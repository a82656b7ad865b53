"""The decoder on a CPU: its convolutions as oneDNN wants them, and few passes over memory between them.

Weights are packed once instead of at every call, SiLU is computed inside the convolution before it, upsampling is
folded (engines.models.folding), and norm and residual run slice by slice, so that their fp32 intermediates stay in the
cache. All tensors are channels-last, in which a norm over channels needs no transposition. The operators are those
that torch.compile's CPU backend calls (torch/_inductor/fx_passes/mkldnn_fusion.py).

Shapes: [B, C, H, W], channels-last in memory.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.models.dcae import Decoder, EfficientViTBlock, MultiscaleLinearAttention, ResBlock, Upsample
from engines.models.folding import folded_kernel, phases_of, shortcuts_of
from engines.models.layers import GLUMBConv, RMSNorm

TYPICAL = (64, 64)  # the layout of weights is chosen for a picture, and fits others; chosen for none, 1x1 is 8x slower
_SLICE = 2**18  # numbers in one slice: 1 MiB in fp32, the L2 cache of a core


class WideConv(Protocol):
    """Makes what computes a convolution of stride 1 (with SiLU behind it) from [B, C, H, W] to [B, D, H, W]."""

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Callable[[Tensor], Tensor]: ...


class PackedConv:
    """A convolution of stride 1 over weights that are laid out for oneDNN, with SiLU behind it where asked for."""

    def __init__(self, conv: nn.Conv2d, *, silu: bool = False) -> None:
        self._padding, self._groups = list(conv.padding), conv.groups
        self._activation = "swish" if silu else "none"
        self._bias = conv.bias
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight, self._padding, [1, 1], [1, 1], self._groups, [1, conv.in_channels, *TYPICAL]
        )

    def __call__(self, x: Tensor) -> Tensor:
        ones = [1, 1]
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, self._padding, ones, ones, self._groups, self._activation, [], ""
        )
        return y


def _conv(weight: Tensor, bias: Tensor | None, padding: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, padding=padding, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return conv


def rows_of(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B*H*W, C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def slices_of(*tensors: Tensor, numbers: int = _SLICE) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all `tensors` at once, as many as hold so many `numbers`: what fits a cache."""
    step = max(1, numbers // tensors[0].shape[1])
    yield from zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)


class _Norm:
    """RMSNorm of [N, C] rows, in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        assert norm.bias is not None
        self._eps, self._weight, self._bias = norm.eps, norm.weight.float(), norm.bias.float()

    def __call__(self, rows: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
        scale = size.square_().mul_(1 / rows.shape[1]).add_(self._eps).rsqrt_()
        return torch.addcmul(self._bias, rows.float().mul_(scale), self._weight)

    def added_to(self, x: Tensor, y: Tensor) -> Tensor:
        """x + norm(y), in the memory of x."""
        for kept, rows in slices_of(rows_of(x), rows_of(y)):
            kept.add_(self(rows))
        return x


class _ResBlock:
    def __init__(self, block: ResBlock, wide: WideConv) -> None:
        self._first, self._second = wide(block.conv1, silu=True), wide(block.conv2)
        self._norm = _Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm.added_to(x, self._second(self._first(x)))


class _Attention:
    def __init__(self, attention: MultiscaleLinearAttention) -> None:
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        self._project = PackedConv(_conv(torch.cat(weights)[:, :, None, None], None))
        self._scales = [
            (PackedConv(_of(one.get_submodule("proj_in"))), PackedConv(_of(one.get_submodule("proj_out"))))
            for one in attention.to_qkv_multiscale
        ]
        self._attend = attention.attend
        self._out = PackedConv(_conv(attention.to_out.weight[:, :, None, None], None))
        self._norm = _Norm(attention.norm_out)

    def __call__(self, x: Tensor) -> Tensor:
        projected = self._project(x)
        scales = torch.cat([projected, *(last(first(projected)) for first, last in self._scales)], dim=1)
        attended = self._attend(scales).contiguous(memory_format=torch.channels_last)
        return self._norm.added_to(x, self._out(attended))


class _GatedConv:
    def __init__(self, block: GLUMBConv, wide: WideConv) -> None:
        assert block.norm is not None
        self._widen, self._depth = wide(block.conv_inverted, silu=True), PackedConv(block.conv_depth)
        self._narrow, self._norm = wide(block.conv_point), _Norm(block.norm)

    def __call__(self, x: Tensor) -> Tensor:
        value, gate = self._depth(self._widen(x)).chunk(2, dim=1)
        gated = torch.empty_like(value, memory_format=torch.channels_last)
        for out, one, other in slices_of(rows_of(gated), _view(value), _view(gate)):
            torch.mul(one, F.silu(other), out=out)
        return self._norm.added_to(x, self._narrow(gated))


def _view(x: Tensor) -> Tensor:
    """As `rows_of`, of a part of the channels."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class _Upsample:
    def __init__(self, upsample: Upsample, wide: WideConv) -> None:
        # A 1 among the weights is free, but 8 bits with one scale per channel would hold that 1 and little else.
        self._repeats = 0 if wide is PackedConv else upsample.repeats  # of a shortcut that is added apart
        weight, bias = folded_kernel(upsample, shortcut=not self._repeats)
        self._conv = wide(_conv(weight, bias, padding=1))

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        phases = phases_of(self._conv(x), height, width)
        size = (batch, phases[0].shape[1], 2 * height, 2 * width)
        out = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        targets = [out[:, :, phase // 2 :: 2, phase % 2 :: 2] for phase in range(4)]
        if self._repeats:
            for target, part, shortcut in zip(targets, phases, shortcuts_of(x, self._repeats), strict=True):
                torch.add(part, shortcut, out=target)
        else:
            for target, part in zip(targets, phases, strict=True):
                target.copy_(part)
        return out


class CpuDecoder(nn.Module):
    """As dcae.Decoder.forward, of a loaded `decoder` on the CPU, whose weights it copies; fp32 or bf16."""

    def __init__(self, decoder: Decoder, wide: WideConv = PackedConv) -> None:
        super().__init__()
        self._repeats = decoder.repeats  # of the shortcut around the first convolution
        self._first = PackedConv(_of(decoder.conv_in))
        self._steps = [
            step
            for stage in reversed(decoder.up_blocks)
            for block in _of_sequence(stage)
            for step in _steps(block, wide)
        ]
        self._norm, self._act = _Norm(decoder.norm_out), decoder.act
        last = decoder.conv_out
        self._last = _Upsample(last, wide) if isinstance(last, Upsample) else PackedConv(_of(last))

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.contiguous(memory_format=torch.channels_last)
        x = self._first(latent)
        if self._repeats:
            x += latent.repeat_interleave(self._repeats, dim=1)
        for step in self._steps:
            x = step(x)
        for (rows,) in slices_of(rows_of(x)):
            rows.copy_(self._act(self._norm(rows)))
        return self._last(x)


def _of(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _of_sequence(module: nn.Module) -> nn.Sequential:
    assert isinstance(module, nn.Sequential)
    return module


def _steps(block: nn.Module, wide: WideConv) -> list[_ResBlock | _Attention | _GatedConv | _Upsample]:
    if isinstance(block, EfficientViTBlock):
        return [_Attention(block.attn), _GatedConv(block.conv_out, wide)]
    if isinstance(block, Upsample):
        return [_Upsample(block, wide)]
    assert isinstance(block, ResBlock)
    return [_ResBlock(block, wide)]
