"""Chooses how the decoder's steps are computed on this CPU, by a measurement of each kind of block.

A quarter or half of the products, for more passes over memory, wins where products are slow. With AMX they are not, and
direct convolutions win. So each width of channels is measured (engines.backends.cpu.timings).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engines.backends.cpu.onednn_steps import OneDnnSteps
from engines.backends.cpu.steps import Attend, Step, Steps
from engines.backends.cpu.timings import Timings, Ways, fastest, in_words
from engines.models.dcae import ResBlock, Upsample
from engines.models.layers import GLUMBConv

ROWS = 32
NUMEL = 2**19  # numbers in the measured input: 10 GFLOP in a ResBlock of 512 channels


class FastestSteps:
    """Builds steps (engines.backends.cpu.decoder.AllSteps) of the fastest of several kinds.

    `cache`: the folder that keeps the measurements. `onednn`, which is called `name`, computes all blocks, and `others`
    some of them.
    """

    def __init__(self, cache: Path, name: str, onednn: OneDnnSteps, others: Mapping[str, Steps]) -> None:
        self._timings, self._onednn, self._first = Timings(cache), onednn, name
        self._kinds: dict[str, Steps] = {name: onednn, **others}
        self._milliseconds: dict[str, dict[str, float]] = {}  # by block, then by kind

    def res_block(self, block: ResBlock) -> Step:
        name = f"ResBlock of {block.conv1.in_channels} channels"
        return self._fastest(name, block, block.conv1, lambda kind: kind.res_block(block))

    def upsample(self, upsample: Upsample) -> Step:
        conv = upsample.conv
        name = f"upsampling of {conv.in_channels} to {conv.out_channels} channels"
        return self._fastest(name, upsample, conv, lambda kind: kind.upsample(upsample))

    def gated(self, block: GLUMBConv) -> Step:
        return self._onednn.gated(block)

    def attend(self, head_dim: int) -> Attend:
        return self._onednn.attend(head_dim)

    @property
    def reason(self) -> str:
        """Returns the kinds that were chosen, with the milliseconds of each."""
        figures = [f"{fastest(kinds)} for {of} ({in_words(kinds)})" for of, kinds in sorted(self._milliseconds.items())]
        return "; ".join(figures)

    def _fastest(self, name: str, block: ResBlock | Upsample, conv: nn.Conv2d, build: Callable[[Steps], Step]) -> Step:
        """`build` makes the step of one kind; `conv` is the first convolution of the block."""
        name = f"{name} in {str(conv.weight.dtype).removeprefix('torch.')}"
        kinds = {kind: steps for kind, steps in self._kinds.items() if kind == self._first or steps.computes(block)}
        if len(kinds) > 1 and name not in self._milliseconds:
            self._milliseconds[name] = self._timings.of(name, kinds, lambda: _ways(conv, kinds, build))
        return build(kinds[fastest(self._milliseconds[name]) if len(kinds) > 1 else self._first])


def _ways(conv: nn.Conv2d, kinds: Mapping[str, Steps], build: Callable[[Steps], Step]) -> Ways:
    """Returns the step of each kind with an input to run on."""
    size = (1, conv.in_channels, ROWS, NUMEL // (conv.in_channels * ROWS))
    x = torch.empty(size, dtype=conv.weight.dtype).normal_(generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    return {kind: partial(build(steps), x) for kind, steps in kinds.items()}
