"""The steps of the decoder on a CPU: what builds them, and the norm that most of them end with."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engines.backends.cpu.convolution import cache_sized_slices
from engines.backends.cpu.kernels.layout import pixel_rows
from engines.models.dcae import ResBlock, Upsample
from engines.models.layers import RMSNorm

Step = Callable[[Tensor], Tensor]  # computes as its block; may change its input in place


class Steps(Protocol):
    """Builds steps from those blocks of the decoder that it computes."""

    def computes(self, block: ResBlock | Upsample) -> bool: ...

    def res_block(self, block: ResBlock) -> Step: ...

    def upsample(self, upsample: Upsample) -> Step: ...


class Norm:
    """RMSNorm of rows [N, C], in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        assert norm.bias is not None
        self._eps, self._weight, self._bias = norm.eps, norm.weight.float(), norm.bias.float()

    def __call__(self, rows: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
        scale = size.square_().mul_(1 / rows.shape[1]).add_(self._eps).rsqrt_()
        return torch.addcmul(self._bias, rows.float().mul_(scale), self._weight)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds norm(y) to x, in place."""
        for target, rows in cache_sized_slices(pixel_rows(x), pixel_rows(y)):
            target.add_(self(rows))
