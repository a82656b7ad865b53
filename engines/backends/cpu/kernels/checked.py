"""The C library, if all that it computes is right: a compiler that nobody has tried may be wrong."""

from functools import cache
from pathlib import Path

import torch

from engines.backends.cpu.kernels import (
    cross_attention,
    few_rows,
    gated_depthwise,
    linear_attention,
    norms,
    winograd_4x4,
)
from engines.backends.cpu.kernels.library import Library, find_library

KERNELS = (winograd_4x4, gated_depthwise, few_rows, norms, linear_attention, cross_attention)


@cache
@torch.inference_mode()
def load_library(folder: Path) -> Library | None:
    """Loads the library for this CPU, or compiles it into the cache `folder`. None without one that computes right."""
    library = find_library(folder)
    return library if library is not None and all(kernel.computes_right(library) for kernel in KERNELS) else None
