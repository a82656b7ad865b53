"""Figures of a measurement: percentiles, tables for people, and the machine that they hold for."""

import argparse
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import numpy as np


class Spread(TypedDict):
    """Of one quantity, in its own unit."""

    p50: float
    p95: float
    p99: float
    mean: float
    max: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """None without values; no quantity is made up."""
    if not values:
        return None
    p50, p95, p99 = (round(float(value), 6) for value in np.percentile(values, [50, 95, 99]))
    mean, largest = round(float(np.mean(values)), 6), round(float(max(values)), 6)
    return Spread(p50=p50, p95=p95, p99=p99, mean=mean, max=largest, count=len(values))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, columns aligned; floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from N or WxH, for argparse."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed is N or WxH, such as 512 or 640x384")
    return int(found.group(1)), int(found.group(2) or found.group(1))


def command(program: str, argv: Sequence[str]) -> str:
    """The line to type for the same measurement."""
    return f"python -m {program} {shlex.join(argv)}".strip()


def machine() -> dict[str, object]:
    """What the figures hold for: day, processor, cores this process may use, what else kept it busy (processes that
    wanted to run, over the last five minutes), memory, versions, revision of the code."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[1], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "revision": _revision(),
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _revision() -> str | None:
    """The commit, marked where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
