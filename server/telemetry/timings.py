"""Stage timings of a request, their header and JSON, and the age of this process."""

import os
from pathlib import Path
from typing import NamedTuple


class Timings(NamedTuple):
    """Milliseconds per stage; of several images, the maximum. `encode` includes the wait for a codec thread."""

    queue: float
    text: float
    denoise: float
    decode: float
    encode: float
    total: float
    safety: float | None = None  # checks of prompt and image; `encode` includes the image's


def milliseconds(timings: Timings) -> dict[str, float]:
    """Returns each stage and the total for a JSON body, rounded to 0.001 ms."""
    return {stage: round(ms, 3) for stage, ms in timings._asdict().items() if ms is not None}


def server_timing(timings: Timings) -> str:
    """Returns the Server-Timing header: each stage and the total, in milliseconds."""
    return ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings._asdict().items() if ms is not None)


def process_age_s() -> float | None:
    """Returns the seconds since this process started, imports included; None without /proc."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return round(up - ticks / os.sysconf("SC_CLK_TCK"), 2)
