"""Allows one build of an engine at a time on a volume, by a kernel lock (flock) that ends with its holder.

The lock file stays. It contains the build's progress for the processes that wait.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.generation.engine_source import Building

_BYTES = 1024  # one write, so that a reader sees a whole state


class HeldLock:
    """A lock that this process holds. A child that inherits `descriptor` holds it too."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write_progress(self, building: Building) -> None:
        """Writes the build's progress; a full disk is ignored."""
        text = json.dumps([building.module, building.percent, building.seconds_left]).encode()[:_BYTES]
        with contextlib.suppress(OSError):
            os.pwrite(self.descriptor, text.ljust(_BYTES), 0)


@contextmanager
def build_lock(path: Path, wait: Callable[[Building | None], None]) -> Iterator[HeldLock]:
    """Holds the lock of `path`. While another process holds it, calls `wait` repeatedly with that build's progress.

    `wait` pauses; it raises to stop waiting. Raises OSError if the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait(_read_progress(descriptor))
        yield HeldLock(descriptor)
    finally:
        os.close(descriptor)


def _read_progress(descriptor: int) -> Building | None:
    try:
        return Building(*json.loads(os.pread(descriptor, _BYTES, 0)))
    except (ValueError, TypeError):
        return None
