"""The steps of the decoder on a CPU: what builds them, the norm that most of them end with, and attention.

Shapes: N pixels, H heads of d.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.convolution import cache_sized_slices
from engines.backends.cpu.kernels.layout import pixel_rows
from engines.models.dcae import ATTENTION_EPS, ResBlock, Upsample
from engines.models.layers import RMSNorm

Step = Callable[[Tensor], Tensor]  # computes as its block; may change its input in place
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # writes attention of three [N, H, d] to the last


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


def attend_in_slices(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Attends as engines.models.dcae.attend, in slices whose fp32 intermediates stay in the cache."""
    _, heads, head_dim = query.shape
    context, total = torch.zeros(heads, head_dim, head_dim), torch.zeros(heads, head_dim, 1)
    for keys, values in cache_sized_slices(key, value):
        keys = F.relu(keys.transpose(0, 1).float())  # [H, n, d]
        context.baddbmm_(keys.transpose(1, 2), values.transpose(0, 1).float())
        total += keys.sum(1).unsqueeze(2)
    for queries, target in cache_sized_slices(query, out):
        queries = F.relu(queries.transpose(0, 1).float())
        target.transpose(0, 1).copy_((queries @ context).div_(queries @ total + ATTENTION_EPS))
