"""What TensorRT says while it works, kept for our errors, and the care that its logger needs."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_SEVERE, _LOGGED = 1, 3  # of trt.ILogger.Severity: internal error 0, error 1, warning 2, info 3, verbose 4


@dataclass
class Log:
    """What TensorRT says, kept: its exceptions carry no text. Not what is verbose: a line for every kernel."""

    lines: list[tuple[int, str]] = field(default_factory=list)

    def first_error(self) -> str:
        """The first, for the ones behind it are its consequences (or of a GPU that is not there)."""
        errors = [line for severity, line in self.lines if severity <= _SEVERE]
        return summarise(errors[0]) if errors else "no reason given"

    def activation_bytes(self) -> int | None:
        """The largest activation memory that the builder planned; None where it said nothing."""
        matches = [re.search(r"Total Activation Memory: (\d+) bytes", line) for _, line in self.lines]
        return max((int(match[1]) for match in matches if match), default=None)

    def attach(self, trt: Any) -> Any:
        """A logger object of `trt` that writes here."""
        lines = self.lines

        class Logger(trt.ILogger):  # type: ignore[misc]  # trt is a module known at run time only
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= _LOGGED:
                    lines.append((int(severity), message))

        return Logger()


def summarise(message: str) -> str:
    """What TensorRT means, in one line, without its source positions, error codes and consequences."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith("Invalid Node")), message.strip())
    if "Plugin not found" in line:
        return "it has no such operator"
    driver = re.search(r"cudaError \d+: [^)]+", line)
    if driver:
        return driver[0]
    inner = re.search(r"Error Code \d+: [\w ]+\((.*)\)", line)
    line = re.sub(r"^(\[[^\]]*\]\s*)+", "", inner[1] if inner else line)
    return re.sub(r"\.? In \w+ at /\S+$", "", line).rstrip(".")[:400]


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Within the block Python collects no cycles.

    TensorRT calls the logger with a lock held that the destructor of a builder takes too. A collection in the logger
    that finds a builder, left in the traceback of an earlier refusal, would wait for itself for ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
