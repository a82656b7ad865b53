"""The contract of a backend: a module goes in, a drop-in that is called and answers exactly like it comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

ModuleName = Literal["transformer", "decoder", "encoder"]  # SprintTransformer, PixelDecoder, PixelEncoder


@dataclass(frozen=True)
class ModuleSpec:
    """What a backend is told about the module it is to execute."""

    name: ModuleName
    dtype: torch.dtype
    device: torch.device
    max_batch: int


Backend = Callable[[nn.Module, ModuleSpec], Callable[..., Any]]
