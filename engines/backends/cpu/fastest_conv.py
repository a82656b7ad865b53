"""Chooses between the 3x3 convolutions on this CPU: WinogradConv, or PackedConv, which is direct.

Winograd's halves the products and adds passes over memory. Without AMX it takes 0.6 to 0.8 of the direct one's time;
with AMX, 1.4 times (bench/LOG.md). So each width of channels is measured (engines.backends.cpu.timings).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engines.backends.cpu.convolution import Conv, ConvFactory, PackedConv
from engines.backends.cpu.timings import Timings, Ways, fastest, in_words
from engines.backends.cpu.winograd import WinogradConv

ROWS = 32
NUMEL = 2**19  # numbers in the measured input: 5 GFLOP at 512 channels

_FACTORIES: dict[str, type[WinogradConv] | type[PackedConv]] = {"winograd": WinogradConv, "direct": PackedConv}


class FastestConv:
    """Factory of 3x3 convolutions (engines.backends.cpu.convolution.ConvFactory) that builds the fastest kind.

    `cache`: the folder that keeps the measurements.
    """

    def __init__(self, cache: Path, factories: Mapping[str, ConvFactory] = _FACTORIES) -> None:
        self._timings, self._factories = Timings(cache), factories
        self._milliseconds: dict[str, dict[str, float]] = {}  # by dtype and channels, then by kind

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Conv:
        shape = f"{str(conv.weight.dtype).removeprefix('torch.')} {conv.in_channels} to {conv.out_channels} channels"
        if shape not in self._milliseconds:
            self._milliseconds[shape] = self._timings.of(
                f"3x3 convolution, {shape}", self._factories, partial(self._ways, conv)
            )
        return self._factories[fastest(self._milliseconds[shape])](conv, silu=silu)

    @property
    def reason(self) -> str:
        """Returns the kinds that were built, with the milliseconds of each."""
        figures = [
            f"{fastest(kinds)} for {shape} ({in_words(kinds)})" for shape, kinds in sorted(self._milliseconds.items())
        ]
        return "3x3 convolutions: " + "; ".join(figures)

    def _ways(self, conv: nn.Conv2d) -> Ways:
        """Returns each kind with an input to run on."""
        size = (1, conv.in_channels, ROWS, NUMEL // (conv.in_channels * ROWS))
        x = torch.empty(size, dtype=conv.weight.dtype).normal_(generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=torch.channels_last)
        return {kind: partial(make(conv, silu=True), x) for kind, make in self._factories.items()}
