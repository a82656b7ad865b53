"""The contract of a backend: it takes a module and returns a callable with the same arguments and results."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

# SprintTransformer, PixelDecoder, PixelEncoder, ControlledTransformer, the PixelDecoder of --fast-decoder
ModuleName = Literal["transformer", "decoder", "encoder", "controlled", "fast_decoder"]

CACHE = Path("~/.cache/sana-sprint")


@dataclass(frozen=True)
class ModuleSpec:
    """Name, type, device and shapes of the module that a backend executes."""

    name: ModuleName
    dtype: torch.dtype
    device: torch.device
    max_batch: int
    tokens: int = 300  # text positions; backends with fixed shapes pad to them
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels to prepare for
    compression: int = 32  # pixels per cell of the latent
    cache: Path = CACHE  # folder for modules that are compiled at load time
    int8: bool = False  # run wide products in 8 bits: the decoder's convolutions, the transformer's maps
    reasons: MutableMapping[str, str] = field(default_factory=dict)  # a backend adds why it chose something

    @property
    def input_sizes(self) -> frozenset[tuple[int, int]]:
        """(height, width) of the module's input at each of `sizes`: latent cells, or pixels for the encoder."""
        unit = 1 if self.name == "encoder" else self.compression
        return frozenset((height // unit, width // unit) for width, height in self.sizes)


Backend = Callable[[nn.Module, ModuleSpec], Callable[..., Any]]
