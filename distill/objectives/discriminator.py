"""LADD's discriminator: small heads on the outputs of some blocks of the frozen teacher, which reads re-noised latents.

Paper section 3.3 and figure 4; NVlabs diffusion/model/nets/sana_ladd.py. Shapes: B jobs, D width, N tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from engines.models.transformer import SprintTransformer
from engines.sampler import flow_time, input_scale, mix

VIRTUAL_BATCH = 8


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most `VIRTUAL_BATCH` samples, without running statistics. [B,D,N] -> [B,D,N]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = torch.split(x.float(), VIRTUAL_BATCH)
        normed = torch.cat([F.batch_norm(group, None, None, training=True) for group in groups])
        return normed * self.weight[:, None] + self.bias[:, None]


def _convolution(channels: int, out_channels: int, kernel: int) -> nn.Module:
    return spectral_norm(nn.Conv1d(channels, out_channels, kernel, padding=kernel // 2, padding_mode="circular"))


class Head(nn.Module):
    """Features [B,D,N] -> one logit per token [B,N]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inward = nn.Sequential(_convolution(channels, channels, 1), LocalBatchNorm(channels), nn.LeakyReLU(0.2))
        self.residual = nn.Sequential(_convolution(channels, channels, 9), LocalBatchNorm(channels), nn.LeakyReLU(0.2))
        self.outward = _convolution(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.inward(features)
        x = (x + self.residual(x)) / 2**0.5
        logits: Tensor = self.outward(x)
        return logits[:, 0]


class Discriminator(nn.Module):
    """Heads on a frozen teacher. Only the heads are parameters of this module."""

    def __init__(self, teacher: SprintTransformer, blocks: Sequence[int]) -> None:
        super().__init__()
        layers = len(teacher.transformer_blocks)
        invalid = [block for block in blocks if not 0 <= block < layers]
        if invalid:
            raise ValueError(f"head_block_ids: got {invalid}, the teacher has blocks 0 to {layers - 1}")
        self.heads = nn.ModuleList(Head(teacher.config.dim) for _ in blocks)
        self._teacher = [teacher]  # in a list, so that it is no submodule: neither trained nor saved
        self._blocks = tuple(blocks)

    def forward(self, clean: Tensor, noise: Tensor, angle: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Returns logits [B, heads * N] of clean latents [B,C,h,w], re-noised to `angle` [B], with their captions."""
        (teacher,) = self._teacher
        time = flow_time(angle)
        x = input_scale(time)[:, None, None, None] * mix(clean, noise, angle)
        features: dict[int, Tensor] = {}
        hooks = [
            teacher.transformer_blocks[block].register_forward_hook(
                lambda _module, _inputs, output, block=block: features.__setitem__(block, output)
            )
            for block in self._blocks
        ]
        try:
            teacher(x, text, time, torch.zeros_like(time), mask)
        finally:
            for hook in hooks:
                hook.remove()
        logits = [head(features[block].transpose(1, 2)) for head, block in zip(self.heads, self._blocks, strict=True)]
        return torch.cat(logits, dim=1)
