"""Weights of the text encoder's MLPs: in the encoder's type, or in 8 bits alone.

In 8 bits only e4m3 and the scales of rows are stored. Products of few rows read them as they are. Others read the same
values in the encoder's type, which a kernel writes to memory that all layers share, since each lives for one product.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.kernels.e4m3 import FP8, power_of_two_scales
from engines.kernels.op import Ops
from engines.kernels.text.widened_weight import WIDENED_WEIGHT
from engines.models.gemma import GatedMLP


class MlpWeight(NamedTuple):
    """A matrix [N, K]; in e4m3 with a scale for each row, fp32 [N]."""

    values: Tensor
    scale: Tensor | None = None  # None: not in 8 bits

    def narrowed(self) -> "MlpWeight":
        """Returns the weight in 8 bits; itself if it is."""
        if self.scale is not None:
            return self
        scale = power_of_two_scales(self.values)
        return MlpWeight((self.values.float() / scale[:, None]).to(FP8), scale)

    def wide(self, ops: Ops, dtype: torch.dtype) -> Tensor:
        """Returns the matrix in `dtype`, which is its own type outside of 8 bits."""
        if self.scale is None:
            return self.values
        widened: Tensor = ops(WIDENED_WEIGHT, self.values, self.scale, dtype)
        return widened

    def rows(self, start: int, stop: int) -> "MlpWeight":
        """Returns these rows, in the same memory."""
        return MlpWeight(self.values[start:stop], None if self.scale is None else self.scale[start:stop])


class NarrowLinear(nn.Module):
    """Replaces a linear map without bias: a weight in 8 bits, which each call reads in the type of its input."""

    def __init__(self, weight: MlpWeight):
        super().__init__()
        self.narrow = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.narrow.wide(Ops(None), x.dtype))


def give_up_wide(mlp: GatedMLP, gate_up: MlpWeight, down: MlpWeight) -> None:
    """Makes the module compute by weights in 8 bits, so that its own are freed. gate_up: gate above up."""
    width = gate_up.values.shape[0] // 2
    parts = {"gate_proj": gate_up.rows(0, width), "up_proj": gate_up.rows(width, 2 * width), "down_proj": down}
    for name, weight in parts.items():
        setattr(mlp, name, NarrowLinear(weight))
