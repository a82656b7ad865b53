"""Embeddings of the transformer's inputs: patches, positions, time, guidance.

Parameter names are those of diffusers models/embeddings.py and models/normalization.py (AdaLayerNormSingle).

Shapes: B jobs, C latent channels, h x w latent, N = h*w image tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 128  # each as a cosine and a sine


def sinusoid(position: Tensor) -> Tensor:
    """Returns cosines, then sines of position [B] at 128 frequencies from 1 to 1e-4: [B, 256], fp32."""
    angle = position[:, None].float() * frequencies(position.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def frequencies(device: torch.device) -> Tensor:
    """Returns the frequencies [128] of a time embedding, fp32."""
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=device)
    return torch.exp(steps * (-math.log(10000.0) / _FREQUENCIES))


def positions(dim: int, height: int, width: int, base: int, scale: float, device: torch.device | str) -> Tensor:
    """Returns the sincos embedding [1, height*width, dim], fp32: first half from the column, second from the row.

    A grid of any size spans [0, base/scale), as in diffusers' PatchEmbed without a maximum size.
    """
    omega = torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim / 4)

    def axis(size: int) -> Tensor:  # [size, dim/2]
        position = torch.arange(size, dtype=torch.float32, device=device) / (size / base) / scale
        angle = position[:, None] * (1.0 / 10000**omega)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = axis(width)[None].expand(height, -1, -1)
    row = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)[None].float()


class PatchEmbed(nn.Module):
    """Embeds a latent [B, C, h, w] as tokens [B, N, D]; adds a positional embedding unless `scale` is None.

    `base` is the side of the latent in training (sample_size).
    """

    pos_embed: Tensor | None

    def __init__(self, channels: int, dim: int, base: int, scale: float | None):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 1)
        self.base = base
        self.scale = scale
        table = None
        if scale is not None:  # on the CPU even if parameters are on the meta device
            table = positions(dim, base, base, base, scale, "cpu")
        self.register_buffer("pos_embed", table, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        height, width = latent.shape[-2:]
        patches: Tensor = self.proj(latent)
        x = patches.flatten(2).transpose(1, 2).contiguous()  # later sums take this layout, in every block
        if self.scale is None or self.pos_embed is None:
            return x
        table = self.pos_embed
        if (height, width) != (self.base, self.base):
            table = positions(x.shape[-1], height, width, self.base, self.scale, x.device)
        return (x + table).to(x.dtype)


class MLP(nn.Module):
    """Linear, activation, Linear; named as in diffusers' TimestepEmbedding and PixArtAlphaTextProjection."""

    def __init__(self, channels: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.act = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return out


class TimeGuidanceEmbed(nn.Module):
    """Embeds time [B] and guidance [B]; returns the modulation [B, 6*D] of all blocks and the embedding [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = MLP(2 * _FREQUENCIES, dim, nn.SiLU())
        self.guidance_embedder = MLP(2 * _FREQUENCIES, dim, nn.SiLU())
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        if guidance is None:
            raise ValueError("guidance: got None; this transformer embeds guidance and needs a tensor [B]")
        dtype = self.linear.weight.dtype
        time = self.timestep_embedder(sinusoid(timestep).to(dtype))
        embedded = time + self.guidance_embedder(sinusoid(guidance).to(dtype))
        return self.linear(F.silu(embedded)), embedded


class TimeEmbed(nn.Module):
    """Embeds time [B] alone, as in base Sana (AdaLayerNormSingle)."""

    def __init__(self, dim: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": MLP(2 * _FREQUENCIES, dim, nn.SiLU())})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        if guidance is not None:
            raise ValueError("guidance: got a tensor; this transformer has no guidance embedding, pass None")
        embedded = self.emb["timestep_embedder"](sinusoid(timestep).to(self.linear.weight.dtype))
        return self.linear(F.silu(embedded)), embedded
