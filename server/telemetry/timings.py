"""How long each stage of a request took, and the header that tells it."""

from typing import NamedTuple


class Timings(NamedTuple):
    """Milliseconds. Of several pictures, the slowest in each stage; encode includes the wait for a codec thread."""

    queue: float
    text: float
    denoise: float
    decode: float
    encode: float
    total: float


def server_timing(timings: Timings) -> str:
    """The Server-Timing header: each stage and the total, in milliseconds."""
    return ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in timings._asdict().items())
