"""Blocks of decoder and encoder on a GPU: ResBlocks on zero-bordered images, EfficientViT blocks on plain ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.kernels.autoencoder.convolution import CONVOLUTION, CONVOLUTION_NORM, CONVOLUTION_SILU
from engines.kernels.autoencoder.depthwise import DEPTHWISE, SIDE
from engines.kernels.autoencoder.padded import Grid
from engines.kernels.autoencoder.rms_norm import RMS_NORM, Layout
from engines.kernels.e4m3 import FP8, FP8_MAX, input_scale
from engines.kernels.gated_depthwise import GATED_DEPTHWISE
from engines.kernels.linear_attention import MULTISCALE_ATTENTION
from engines.kernels.op import Ops
from engines.kernels.silu_product import SILU_PRODUCT
from engines.models.dcae import EfficientViTBlock, ResBlock
from engines.models.layers import RMSNorm

NORM_WIDTHS = (32, 64, 128, 256)  # channels that one tile spans, so that the convolution's kernel can apply the norm


def unsupported_blocks(
    side: str,
    types: Sequence[str],
    depths: Sequence[int],
    widths: Sequence[int],
    scales: Sequence[tuple[int, ...]],
    head_dim: int,
) -> str | None:
    """Returns the reason why these blocks cannot run the encoder or the decoder (`side`); None if they can.

    Sequences begin with the highest resolution.
    """
    residual = sum(kind == "ResBlock" for kind in types)
    if any(kind == "ResBlock" for kind in types[residual:]) or residual in (0, len(types)) or not all(depths):
        return (
            f"{side}_block_types are {tuple(types)} of {tuple(depths)} layers; blocks at every resolution, ResBlocks "
            "at the high and EfficientViT blocks at the low ones are needed"
        )
    if any(width % 32 for width in widths) or head_dim % 8:
        return f"{side}_block_out_channels are {tuple(widths)}; multiples of 32 are needed"
    if any(kernels != (SIDE,) for kernels in scales[residual:]):
        return f"{side}_qkv_multiscales are {tuple(scales)}; one scale of {SIDE} is needed"
    return None


def make_blocks(stage: nn.Module) -> "list[ResidualBlock | VitBlock]":
    """Returns the blocks of one resolution, without its up- or downsampling."""
    blocks: list[ResidualBlock | VitBlock] = []
    for part in stage.children():
        if isinstance(part, ResBlock):
            blocks.append(ResidualBlock(part))
        elif isinstance(part, EfficientViTBlock):
            blocks.append(VitBlock(part))
    return blocks


@dataclass(frozen=True)
class BorderedImage:
    """Zero-bordered image [P, C]: in full, and as the next convolution reads it (e4m3, or the same tensor)."""

    full: Tensor
    conv_input: Tensor


class Norm:
    """Parameters of an RMSNorm, in fp32."""

    def __init__(self, norm: RMSNorm):
        assert norm.bias is not None
        self.gain, self.bias, self.eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps


class ConvWeight:
    """Weight of a 3x3 convolution as a matrix [N, 9*C]; in e4m3 with a scale for each row after `to_fp8`."""

    def __init__(self, conv: nn.Conv2d):
        self.weight = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
        self.bias = None if conv.bias is None else conv.bias.detach().float()
        self.scale: Tensor | None = None  # scale of the product of an 8-bit input and these weights

    def to_fp8(self, input_scale: float) -> None:
        scale = self.weight.float().abs().amax(1).clamp_min(1e-12) / FP8_MAX
        self.weight = (self.weight.float() / scale[:, None]).to(FP8)
        self.scale = scale * input_scale


class ResidualBlock:
    """Computes dcae.ResBlock on a BorderedImage."""

    def __init__(self, block: ResBlock):
        self.conv1, self.conv2, self.norm = ConvWeight(block.conv1), ConvWeight(block.conv2), Norm(block.norm)
        self.fuses_norm = block.conv2.out_channels in NORM_WIDTHS
        self.input_scale: float | None = None
        self.hidden_scale: float | None = None
        self.max_values = [0.0, 0.0]  # largest input and hidden value in calibration

    def to_fp8(self) -> None:
        self.input_scale, self.hidden_scale = map(input_scale, self.max_values)
        self.conv1.to_fp8(self.input_scale)
        self.conv2.to_fp8(self.hidden_scale)

    def hidden(self, ops: Ops, x: BorderedImage, grid: Grid) -> Tensor:
        conv, scale = self.conv1, self.hidden_scale or 1.0
        output: Tensor = ops(CONVOLUTION_SILU, x.conv_input, conv.weight, conv.scale, conv.bias, scale, grid)
        return output

    def __call__(self, ops: Ops, x: BorderedImage, grid: Grid, next_scale: float | None) -> BorderedImage:
        hidden, conv, norm = self.hidden(ops, x, grid), self.conv2, self.norm
        if self.fuses_norm:
            output = ops(
                CONVOLUTION_NORM,
                *(hidden, conv.weight, conv.scale, norm.gain, norm.bias, x.full, norm.eps, next_scale, grid),
            )
        else:
            y = ops(CONVOLUTION, hidden, conv.weight, conv.scale, grid)
            output = ops(RMS_NORM, y, norm.gain, norm.bias, x.full, norm.eps, "bordered", next_scale, grid)
        return BorderedImage(output[0], output[-1])


class VitBlock:
    """Computes dcae.EfficientViTBlock on [B*H*W, C]."""

    def __init__(self, block: EfficientViTBlock):
        attention, glu = block.attn, block.conv_out
        self.qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).detach()
        scale: Any = attention.to_qkv_multiscale[0]
        self.taps = scale.proj_in.weight.detach().flatten(1).t().contiguous()  # [K*K, 3C]
        group = scale.proj_out.weight.shape[1]
        self.groups = scale.proj_out.weight.detach().view(-1, group, group).contiguous()
        self.out, self.norm1, self.head_dim = attention.to_out.weight.detach(), Norm(attention.norm_out), group
        self.inverted = glu.conv_inverted.weight.detach().flatten(1).contiguous()
        self.inverted_bias, self.depth_bias = glu.conv_inverted.bias, glu.conv_depth.bias
        self.depth = glu.conv_depth.weight.detach().flatten(1).t().contiguous()  # [9, 2*hidden]
        self.point = glu.conv_point.weight.detach().flatten(1).contiguous()
        assert glu.norm is not None
        self.norm2 = Norm(glu.norm)

    def __call__(self, ops: Ops, x: Tensor, grid: Grid, layout: Layout) -> Tensor:
        qkv = F.linear(x, self.qkv)
        deep = ops(DEPTHWISE, qkv, self.taps, grid)
        attended = F.linear(ops(MULTISCALE_ATTENTION, qkv, deep, self.groups, grid.batch, self.head_dim), self.out)
        norm = self.norm1
        x = ops(RMS_NORM, attended, norm.gain, norm.bias, x, norm.eps, "plain", None, grid)[0]
        wide = ops(SILU_PRODUCT, x, self.inverted, self.inverted_bias)
        y = F.linear(ops(GATED_DEPTHWISE, wide, self.depth, self.depth_bias, *grid), self.point)
        norm = self.norm2
        output: Tensor = ops(RMS_NORM, y, norm.gain, norm.bias, x, norm.eps, layout, None, grid)[0]
        return output
