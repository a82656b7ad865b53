"""Layers that the transformer and the autoencoder share.

Parameter names are those of diffusers, so that published checkpoints load unchanged.

Shape legend: B batch, C channels, H W height and width, N tokens (H*W), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight (+ bias) over one dimension; the mean of squares is fp32.

    `dim` is the normalised dimension: -1 for [B, N, D], 1 for [B, C, H, W] (no transposition needed).
    Source: diffusers models/normalization.py RMSNorm.
    """

    def __init__(self, channels: int, bias: bool = False, dim: int = -1) -> None:
        super().__init__()
        self.eps = 1e-5
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(self.dim, keepdim=True)
        x = (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)
        shape = (-1, 1, 1) if self.dim == 1 else (-1,)
        x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: 1x1 expand, SiLU, 3x3 depthwise, gate, 1x1 project. [B,C,H,W] -> [B,C,H,W].

    Source: SANA section 2.2 (Mix-FFN); diffusers models/transformers/sana_transformer.py GLUMBConv.
    """

    def __init__(self, channels: int, expand_ratio: float = 4.0, norm: bool = False, residual: bool = True) -> None:
        super().__init__()
        hidden = int(expand_ratio * channels)
        self.residual = residual
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = RMSNorm(channels, bias=True, dim=1) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        y: Tensor = self.conv_point(value * F.silu(gate))
        if self.norm is not None:
            y = self.norm(y)
        return x + y if self.residual else y
