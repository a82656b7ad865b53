"""TensorRT's log messages, collected for our errors, and a guard for its logger's lock."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ERROR, _INFO = 1, 3  # of trt.ILogger.Severity: internal error 0, error 1, warning 2, info 3, verbose 4


@dataclass
class Log:
    """Log lines of TensorRT, whose exceptions carry no text. Skips verbose lines, of which every kernel has one."""

    lines: list[tuple[int, str]] = field(default_factory=list)

    def first_error(self) -> str:
        """Returns the first error; later ones are its consequences, or come from a missing GPU."""
        errors = [line for severity, line in self.lines if severity <= _ERROR]
        return summarise(errors[0]) if errors else "no reason given"

    def activation_bytes(self) -> int | None:
        """Returns the largest activation memory that the builder reported; None without a report."""
        matches = [re.search(r"Total Activation Memory: (\d+) bytes", line) for _, line in self.lines]
        return max((int(match[1]) for match in matches if match), default=None)

    def attach(self, trt: Any) -> Any:
        """Returns a logger object of `trt` that appends to `lines`."""
        lines = self.lines

        class Logger(trt.ILogger):  # type: ignore[misc]  # trt is a module known at run time only
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= _INFO:
                    lines.append((int(severity), message))

        return Logger()


def summarise(message: str) -> str:
    """Returns the message as one line without source positions, error codes and consequences."""
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
    """Disables Python's cycle collector within the block.

    TensorRT calls the logger while it holds a lock that a builder's destructor needs. A collection inside the logger
    may find the builder of an earlier error's traceback; its destructor would then deadlock.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
