"""PyTorch as it is: any shape, any batch, no preparation. The reference that other backends are held against."""

import torch
from torch import nn

from engines.backends.spec import ModuleSpec


def eager(module: nn.Module, spec: ModuleSpec) -> nn.Module:
    """The module itself; the autoencoder's convolutions in channels-last, which their kernels read fastest."""
    if spec.name in ("transformer", "controlled"):
        return module
    laid_out: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    return laid_out
