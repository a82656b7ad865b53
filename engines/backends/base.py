"""The contract of a backend: a module goes in, a drop-in that is called and answers exactly like it comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

# SprintTransformer, PixelDecoder, PixelEncoder, ControlledTransformer
ModuleName = Literal["transformer", "decoder", "encoder", "controlled"]

CACHE = Path("~/.cache/sana-sprint")


@dataclass(frozen=True)
class ModuleSpec:
    """What a backend is told about the module it is to execute."""

    name: ModuleName
    dtype: torch.dtype
    device: torch.device
    max_batch: int
    tokens: int = 300  # positions of the text, which backends with fixed shapes pad to
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels that it is prepared for
    compression: int = 32  # pixels per cell of the latent
    cache: Path = CACHE  # folder for what is compiled when it is loaded
    int8: bool = False  # the decoder's wide convolutions in 8 bits, where the backend can

    @property
    def input_sizes(self) -> frozenset[tuple[int, int]]:
        """(height, width) of its input at each of `sizes`: cells, or pixels for the encoder."""
        unit = 1 if self.name == "encoder" else self.compression
        return frozenset((height // unit, width // unit) for width, height in self.sizes)


Backend = Callable[[nn.Module, ModuleSpec], Callable[..., Any]]
