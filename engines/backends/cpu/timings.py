"""Milliseconds of several ways to compute the same on this CPU, measured once and kept in the cache folder.

A choice by time alone could differ from start to start, and with it the images of a seed; so the measurement is kept.
One thread measures: two wait for each other on a busy machine, which says nothing about the ways.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from engines.device.hardware import cpu_flags, expanded, this_machine

FILE = "timings.json"
RUNS = 2  # of each way in turn, after one that does not count

Ways = Mapping[str, Callable[[], object]]


class Timings:
    """Measurements by key, kept in a file.

    `cache`: the folder of the file. One that cannot be written, or a user without a home directory, costs a measurement
    at each start.
    """

    def __init__(self, cache: Path) -> None:
        folder = expanded(cache)
        self._path = None if folder is None else folder / FILE

    def of(self, key: str, ways: Collection[str], make: Callable[[], Ways]) -> dict[str, float]:
        """Returns the milliseconds of each of `ways` on this CPU with this torch; `make` is called to measure them."""
        key = f"{_cpu()}, {key}: {' or '.join(ways)}"
        kept = self._kept(key, ways)
        if kept is None:
            measured = _measure(make())
            kept = self._kept(key, ways) or measured  # another process may have measured meanwhile
            if kept is measured and self._path is not None:
                with contextlib.suppress(OSError):  # a full or read-only disk: measures again at the next start
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    unfinished = self._path.with_suffix(f".{os.getpid()}")
                    unfinished.write_text(json.dumps(self._read() | {key: kept}, indent=1))
                    os.replace(unfinished, self._path)
        return kept

    def _kept(self, key: str, ways: Collection[str]) -> dict[str, float] | None:
        found = self._read().get(key, {})
        return found if found.keys() == set(ways) else None

    def _read(self) -> dict[str, dict[str, float]]:
        if self._path is None:
            return {}
        try:
            cached = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return cached if isinstance(cached, dict) else {}


def fastest(milliseconds: Mapping[str, float]) -> str:
    return min(milliseconds, key=lambda way: milliseconds[way])


def in_words(milliseconds: Mapping[str, float]) -> str:
    return ", ".join(f"{way} {time:.2f} ms" for way, time in milliseconds.items())


def _cpu() -> str:
    """Returns what a measurement depends on besides the shape."""
    amx = "with" if "amx_tile" in cpu_flags().split() else "without"
    return f"{this_machine().cpu} {amx} AMX, torch {torch.__version__}"


@torch.inference_mode()
def _measure(ways: Ways) -> dict[str, float]:
    """Returns the least milliseconds of each way over RUNS turns, after one that does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [{way: _milliseconds(run) for way, run in ways.items()} for _ in range(1 + RUNS)][1:]
    finally:
        torch.set_num_threads(threads)
    return {way: min(turn[way] for turn in turns) for way in ways}


def _milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)
