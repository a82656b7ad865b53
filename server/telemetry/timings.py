"""How long each stage of a request took, and the header that tells it; how long this process has been there."""

import os
from pathlib import Path
from typing import NamedTuple


class Timings(NamedTuple):
    """Milliseconds. Of several pictures, the slowest in each stage; encode includes the wait for a codec thread."""

    queue: float
    text: float
    denoise: float
    decode: float
    encode: float
    total: float
    safety: float | None = None  # of prompt and image, where they are checked; the image's is in encode too


def milliseconds(timings: Timings) -> dict[str, float]:
    """Each stage and the total, as bodies tell them."""
    return {stage: round(ms, 3) for stage, ms in timings._asdict().items() if ms is not None}


def server_timing(timings: Timings) -> str:
    """The Server-Timing header: each stage and the total, in milliseconds."""
    return ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings._asdict().items() if ms is not None)


def process_age_s() -> float | None:
    """Seconds since this process began, imports included; None where /proc does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return round(up - ticks / os.sysconf("SC_CLK_TCK"), 2)
