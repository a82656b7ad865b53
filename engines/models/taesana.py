"""TAESANA: a small decoder of the same latents as DC-AE's, with a fourteenth of its arithmetic.

Convolutions of 3x3 and ReLUs alone: a block is three of them with a residual, a stage three blocks at one resolution.
Distilled from dc-ae-f32c32-sana-1.0; 8.3 M parameters, 593 GFLOP at 1024x1024.

Source: madebyollin/taesd, taesd.py (F32Decoder), whose parameter names these are: positions in one sequence.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import CheckpointError

_BOUND = 3.0  # latents are squeezed into (-3, 3) by a tanh, as the published weights expect


@dataclass(frozen=True)
class TaesanaConfig:
    """Channels and blocks of each stage, lowest resolution first; the defaults are the published decoder."""

    latent_channels: int = 32
    channels: tuple[int, ...] = (256, 128, 64, 64, 64, 64)
    blocks: tuple[int, ...] = (3, 3, 3, 3, 3, 1)

    def __post_init__(self) -> None:
        """Raises CheckpointError where the stages cannot be."""
        if len(self.channels) != len(self.blocks) or not self.channels or min(*self.channels, *self.blocks) < 1:
            raise CheckpointError(
                f"taesana config: got channels {list(self.channels)} and blocks {list(self.blocks)}; one positive "
                "number of each per stage is needed"
            )

    @property
    def compression(self) -> int:
        """Pixels per latent cell along each side."""
        return 1 << (len(self.channels) - 1)

    def to_dict(self) -> dict[str, object]:
        """The config.json that `from_dict` reads back."""
        return {"_class_name": "TaesanaDecoder", **asdict(self)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TaesanaConfig":
        """From config.json. Raises CheckpointError naming a key that is unknown."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(values.keys() - known):
            raise CheckpointError(f"taesana config: unknown keys {', '.join(unknown)}; known are {sorted(known)}")
        stages = {key: tuple(value) for key, value in values.items() if key != "latent_channels"}
        return cls(values.get("latent_channels", cls.latent_channels), **stages)


class Squeeze(nn.Module):
    """tanh(x / 3) * 3: keeps outliers of a latent near the range that was trained on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / _BOUND) * _BOUND


class Block(nn.Module):
    """Three convolutions with ReLUs between, residual, ReLU. [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TaesanaDecoder(nn.Sequential):
    """Latent [B,32,h,w] of unit variance -> RGB [B,3,32h,32w] in about [-1,1].

    The published file gives [0,1]; the range here is that of DC-AE's decoder, so that either can stand for the other.
    """

    def __init__(self, config: TaesanaConfig) -> None:
        widths = config.channels
        layers: list[nn.Module] = [Squeeze(), nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for index, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if index:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[index - 1], width, 3, padding=1, bias=False)]
            layers += [Block(width) for _ in range(blocks)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, latent: Tensor) -> Tensor:
        pixels: Tensor = super().forward(latent)  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        return pixels * 2 - 1
