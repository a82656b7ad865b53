"""LoRA adapters of linear maps and 1x1 convolutions, selected per job of a batch.

A stack holds all adapters of a module, padded to one rank; each job gathers its adapters by index. So one module, and
one captured graph, serves a batch of jobs with any adapters or none.

Source: Hu et al., "LoRA" (2021); a batch of different adapters as in Punica (2023) and S-LoRA (2023).
Shapes: B jobs, N rows of a job, K adapters, S of them at once for a job, R the padded rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Factors(NamedTuple):
    """Factors down [rank, in] and up [out, rank], whose product is added to a weight [out, in]."""

    down: Tensor
    up: Tensor


class AdapterSelection(NamedTuple):
    """Adapters of each job: indices in the stack [B, S] int64 and scales [B, S] fp32, 0 for an unused slot."""

    indices: Tensor
    scale: Tensor


@dataclass
class ActiveAdapters:
    """The selection that the modules of one transformer apply now; None: no adapters."""

    selection: AdapterSelection | None = None

    @contextmanager
    def use(self, chosen: AdapterSelection | None) -> Iterator[None]:
        """Applies `chosen` within the block."""
        previous, self.selection = self.selection, chosen
        try:
            yield
        finally:
            self.selection = previous


class AdapterStack(nn.Module):
    """Factors of all adapters of one module: down [K, R, in] and up [K, out, R]."""

    down: Tensor
    up: Tensor

    def __init__(self, factors: Sequence[Factors | None], like: Tensor, active: ActiveAdapters):
        super().__init__()
        out, inputs = like.shape[:2]
        rank = max(factor.down.shape[0] for factor in factors if factor is not None)
        down, up = torch.zeros(len(factors), rank, inputs), torch.zeros(len(factors), out, rank)
        for index, factor in enumerate(factors):
            if factor is not None:
                down[index, : factor.down.shape[0]] = factor.down
                up[index, :, : factor.up.shape[1]] = factor.up
        self.register_buffer("down", down.to(like.device, like.dtype), persistent=False)
        self.register_buffer("up", up.to(like.device, like.dtype), persistent=False)
        self.active = active

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y [B*N, out], or another shape with rows in this order, plus the adapters' terms of x [B*N, in]."""
        chosen = self.active.selection
        if chosen is None:
            return y
        jobs = len(chosen.indices)
        down, up, scale = self._gathered(chosen, x.dtype)
        low = torch.bmm(x.reshape(jobs, -1, x.shape[-1]), down.mT) * scale[:, None]
        rows = y.reshape(jobs, -1, y.shape[-1])
        return torch.baddbmm(rows, low, up.mT).view(y.shape)

    def add_columns(self, x: Tensor, y: Tensor) -> Tensor:
        """Does the same as `add` for images x [B, in, h, w] and y [B, out, h, w]."""
        chosen = self.active.selection
        if chosen is None:
            return y
        down, up, scale = self._gathered(chosen, x.dtype)
        low = torch.bmm(down, x.flatten(2)) * scale[:, :, None]
        return torch.baddbmm(y.flatten(2), up, low).view(y.shape)

    def _gathered(self, chosen: AdapterSelection, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gathers each job's factors: down [B, S*R, in], up [B, out, S*R] and scales [B, S*R]."""
        down = self.down[chosen.indices].flatten(1, 2)
        up = self.up[chosen.indices].transpose(1, 2).flatten(2)
        return down, up, chosen.scale.to(dtype).repeat_interleave(self.down.shape[1], 1)


class AdaptedLinear(nn.Linear):
    """Linear map with an adapter stack; shares the parameters of the map it replaces."""

    def __init__(self, replaced: nn.Linear, stack: AdapterStack):
        nn.Module.__init__(self)
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.weight, self.bias, self.stack = replaced.weight, replaced.bias, stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.add(x, F.linear(x, self.weight, self.bias))


class AdaptedConv2d(nn.Module):
    """1x1 convolution with an adapter stack; shares the parameters of the one it replaces."""

    def __init__(self, replaced: nn.Conv2d, stack: AdapterStack):
        super().__init__()
        self.weight, self.bias, self.stack = replaced.weight, replaced.bias, stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.add_columns(x, F.conv2d(x, self.weight, self.bias))


class AdaptedTransformer(nn.Module):
    """Transformer, with or without ControlNet, whose call also takes an adapter selection per job."""

    def __init__(self, module: nn.Module, active_adapters: ActiveAdapters):
        super().__init__()
        self.module, self.active_adapters = module, active_adapters

    def forward(self, *arguments: Any, chosen: AdapterSelection | None = None) -> Tensor:
        with self.active_adapters.use(chosen):
            return cast(Tensor, self.module(*arguments))


def is_adaptable(module: nn.Module) -> bool:
    """Returns whether `module` is a linear map or an ungrouped 1x1 convolution of stride 1."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def count_stacks(adapters: Sequence[Mapping[str, Factors]]) -> int:
    """Returns the count of numbers in the stacks that `add_adapters` makes: K * R * (in + out) for each module."""
    numbers = 0
    for name in set().union(*adapters):
        factors = [adapter[name] for adapter in adapters if name in adapter]
        rank = max(factor.down.shape[0] for factor in factors)
        numbers += len(adapters) * rank * (factors[0].down.shape[1] + factors[0].up.shape[0])
    return numbers


def add_adapters(transformer: nn.Module, adapters: Sequence[Mapping[str, Factors]]) -> ActiveAdapters:
    """Replaces every module that one of `adapters` changes with one that has a stack, in place.

    adapters: factors by module name; their order is the stacks' order. `transformer` must be loaded. Returns the
    selection that all stacks read.
    """
    active = ActiveAdapters()
    for name in sorted(set().union(*adapters)):
        replaced = transformer.get_submodule(name)
        assert isinstance(replaced, nn.Linear | nn.Conv2d)
        stack = AdapterStack([adapter.get(name) for adapter in adapters], replaced.weight, active)
        adapted = AdaptedLinear(replaced, stack) if isinstance(replaced, nn.Linear) else AdaptedConv2d(replaced, stack)
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, adapted)
    return active
