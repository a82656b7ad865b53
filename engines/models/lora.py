"""Low-rank additions to linear maps and 1x1 convolutions, chosen anew for each job of a batch.

All adapters of a module lie in one stack, padded to one rank; a job gathers by index those it asked for. So one module,
and one captured graph, serves jobs with any of them beside jobs with none.

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
    """down [rank, in] and up [out, rank], whose product is added to a weight [out, in]."""

    down: Tensor
    up: Tensor


class Chosen(NamedTuple):
    """What each job asked for: places in the stack [B, S] int64, and scales [B, S] fp32, 0 where a place is unused."""

    places: Tensor
    scale: Tensor


@dataclass
class Choice:
    """What the modules of one transformer add at this moment; None: nothing."""

    now: Chosen | None = None

    @contextmanager
    def of(self, chosen: Chosen | None) -> Iterator[None]:
        """`chosen` for as long as the block lasts."""
        before, self.now = self.now, chosen
        try:
            yield
        finally:
            self.now = before


class Stack(nn.Module):
    """The factors of one module: down [K, R, in] and up [K, out, R]."""

    down: Tensor
    up: Tensor

    def __init__(self, factors: Sequence[Factors | None], like: Tensor, choice: Choice):
        super().__init__()
        out, inputs = like.shape[:2]
        rank = max(one.down.shape[0] for one in factors if one is not None)
        down, up = torch.zeros(len(factors), rank, inputs), torch.zeros(len(factors), out, rank)
        for place, one in enumerate(factors):
            if one is not None:
                down[place, : one.down.shape[0]] = one.down
                up[place, :, : one.up.shape[1]] = one.up
        self.register_buffer("down", down.to(like.device, like.dtype), persistent=False)
        self.register_buffer("up", up.to(like.device, like.dtype), persistent=False)
        self.choice = choice

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y [B*N, out], or any shape whose rows are in that order, with what the jobs' adapters make of x [B*N, in]."""
        chosen = self.choice.now
        if chosen is None:
            return y
        jobs = len(chosen.places)
        down, up, scale = self._gathered(chosen, x.dtype)
        low = torch.bmm(x.reshape(jobs, -1, x.shape[-1]), down.mT) * scale[:, None]
        rows = y.reshape(jobs, -1, y.shape[-1])
        return torch.baddbmm(rows, low, up.mT).view(y.shape)

    def add_columns(self, x: Tensor, y: Tensor) -> Tensor:
        """As `add`, of pictures x [B, in, h, w] and y [B, out, h, w]."""
        chosen = self.choice.now
        if chosen is None:
            return y
        down, up, scale = self._gathered(chosen, x.dtype)
        low = torch.bmm(down, x.flatten(2)) * scale[:, :, None]
        return torch.baddbmm(y.flatten(2), up, low).view(y.shape)

    def _gathered(self, chosen: Chosen, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Each job's factors side by side: down [B, S*R, in], up [B, out, S*R], and their scales [B, S*R]."""
        down = self.down[chosen.places].flatten(1, 2)
        up = self.up[chosen.places].transpose(1, 2).flatten(2)
        return down, up, chosen.scale.to(dtype).repeat_interleave(self.down.shape[1], 1)


class AdaptedLinear(nn.Linear):
    """A linear map with a stack; its parameters are those of the map it replaces."""

    def __init__(self, plain: nn.Linear, stack: Stack):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias, self.stack = plain.weight, plain.bias, stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.add(x, F.linear(x, self.weight, self.bias))


class AdaptedConv2d(nn.Module):
    """A 1x1 convolution with a stack; its parameters are those of the one it replaces."""

    def __init__(self, plain: nn.Conv2d, stack: Stack):
        super().__init__()
        self.weight, self.bias, self.stack = plain.weight, plain.bias, stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.add_columns(x, F.conv2d(x, self.weight, self.bias))


class Adapted(nn.Module):
    """A transformer, or one with a ControlNet, whose call also takes what each job chose."""

    def __init__(self, module: nn.Module, choice: Choice):
        super().__init__()
        self.module, self.choice = module, choice

    def forward(self, *arguments: Any, chosen: Chosen | None = None) -> Tensor:
        with self.choice.of(chosen):
            return cast(Tensor, self.module(*arguments))


def is_adaptable(module: nn.Module) -> bool:
    """Whether it is a linear map or a 1x1 convolution of all channels."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def adapt(transformer: nn.Module, adapters: Sequence[Mapping[str, Factors]]) -> Choice:
    """Puts a stack into every module that one of `adapters` (factors by name) touches, in place; the order of adapters
    is that of the stacks. `transformer` must have its weights already."""
    choice = Choice()
    for name in sorted(set().union(*adapters)):
        plain = transformer.get_submodule(name)
        assert isinstance(plain, nn.Linear | nn.Conv2d)
        stack = Stack([adapter.get(name) for adapter in adapters], plain.weight, choice)
        made = AdaptedLinear(plain, stack) if isinstance(plain, nn.Linear) else AdaptedConv2d(plain, stack)
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, made)
    return choice
