"""Chooses between the 3x3 convolutions on this CPU: WinogradConv, or PackedConv, which is direct.

Winograd's halves the products and adds passes over memory. Without AMX it takes 0.6 to 0.8 of the direct one's time;
with AMX, 1.4 times (bench/LOG.md). So each width of channels is measured once on each CPU, and the result is kept. One
thread measures: two wait for each other on a busy machine, which says nothing about the kinds.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.backends.cpu.convolution import Conv, ConvFactory, PackedConv
from engines.backends.cpu.winograd import WinogradConv
from engines.device.hardware import cpu_flags, expanded, this_machine

FILE = "convolutions.json"
ROWS = 32
NUMEL = 2**19  # numbers in the measured input: 5 GFLOP at 512 channels
RUNS = 2

_FACTORIES: dict[str, type[WinogradConv] | type[PackedConv]] = {"winograd": WinogradConv, "direct": PackedConv}


class FastestConv:
    """Factory of 3x3 convolutions (engines.backends.cpu.convolution.ConvFactory) that builds the fastest kind.

    `cache`: the folder that keeps the measurements. One that cannot be written, or a user without a home directory,
    costs a second at each start.
    """

    def __init__(self, cache: Path, factories: Mapping[str, ConvFactory] = _FACTORIES) -> None:
        folder = expanded(cache)
        self._path = None if folder is None else folder / FILE
        self._factories = factories
        self._milliseconds: dict[str, dict[str, float]] = {}  # by dtype and channels, then by kind

    def __call__(self, conv: nn.Conv2d, *, silu: bool = False) -> Conv:
        shape = f"{str(conv.weight.dtype).removeprefix('torch.')} {conv.in_channels} to {conv.out_channels} channels"
        if shape not in self._milliseconds:
            self._milliseconds[shape] = self._measured(shape, conv)
        return self._factories[_fastest(self._milliseconds[shape])](conv, silu=silu)

    @property
    def reason(self) -> str:
        """Returns the kinds that were built, with the milliseconds of each."""
        figures = []
        for shape, kinds in sorted(self._milliseconds.items()):
            times = ", ".join(f"{kind} {milliseconds:.2f} ms" for kind, milliseconds in kinds.items())
            figures.append(f"{_fastest(kinds)} for {shape} ({times})")
        return "3x3 convolutions: " + "; ".join(figures)

    def _measured(self, shape: str, conv: nn.Conv2d) -> dict[str, float]:
        cached = self._read()
        key = f"{_cpu()}, {shape}"
        kept = cached.get(key, {})
        if kept.keys() != self._factories.keys():
            kept = _measure(conv, self._factories)
            if self._path is None:
                return kept
            with contextlib.suppress(OSError):  # a full or read-only disk: measures again at the next start
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(json.dumps(cached | {key: kept}, indent=1))
        return kept

    def _read(self) -> dict[str, dict[str, float]]:
        if self._path is None:
            return {}
        try:
            cached = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return cached if isinstance(cached, dict) else {}


def _fastest(milliseconds: Mapping[str, float]) -> str:
    return min(milliseconds, key=lambda kind: milliseconds[kind])


def _cpu() -> str:
    """Returns what a measurement depends on besides the shape."""
    amx = "with" if "amx_tile" in cpu_flags().split() else "without"
    return f"{this_machine().cpu} {amx} AMX, torch {torch.__version__}"


@torch.inference_mode()
def _measure(conv: nn.Conv2d, factories: Mapping[str, ConvFactory]) -> dict[str, float]:
    """Returns the least milliseconds of each kind over RUNS turns, after one that does not count."""
    size = (1, conv.in_channels, ROWS, NUMEL // (conv.in_channels * ROWS))
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(conv.weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    built = {kind: make(conv, silu=True) for kind, make in factories.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [{kind: _milliseconds(run, x) for kind, run in built.items()} for _ in range(1 + RUNS)][1:]
    finally:
        torch.set_num_threads(threads)
    return {kind: min(turn[kind] for turn in turns) for kind in built}


def _milliseconds(run: Conv, x: Tensor) -> float:
    began = time.perf_counter()
    run(x)
    return 1000 * (time.perf_counter() - began)
