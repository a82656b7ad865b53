"""Seeded inputs of a module, for the trace of a graph and the comparison of engines.

Rows differ in time, guidance and length of text, so that a graph with a constant in place of an input fails.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.backends.base import ModuleName


@dataclass(frozen=True)
class StaticShape:
    """The fixed sizes of a module's inputs; only the batch is dynamic. Height and width are the latent's, in cells."""

    height: int
    width: int
    channels: int
    compression: int  # pixels per cell
    tokens: int
    caption_channels: int

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.height * self.compression, self.width * self.compression


def example_inputs(
    name: ModuleName, shape: StaticShape, batch: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Returns keyword arguments for `name`'s forward, on the CPU; `dtype` is the transformer's."""
    generator = torch.Generator().manual_seed(seed)
    if name == "encoder":
        size = (batch, *shape.pixels, 3)
        return {"pixels": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)}
    latent = torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator)
    if name in ("decoder", "fast_decoder"):
        return {"latent": latent}
    lengths = shape.tokens - torch.arange(batch) % max(1, shape.tokens // 2)
    inputs = {
        "latent": latent.to(dtype),
        "text": torch.randn(batch, shape.tokens, shape.caption_channels, generator=generator).to(dtype),
        "timestep": torch.linspace(1, 0.4, batch),
        "guidance": torch.linspace(0.45, 0.4, batch),
        "text_mask": torch.arange(shape.tokens) < lengths[:, None],
    }
    if name == "controlled":
        inputs["control"] = torch.randn(latent.shape, generator=generator).to(dtype)
        inputs["control_scale"] = torch.linspace(1, 0.3, batch)
    return inputs
