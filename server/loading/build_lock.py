"""One build of an engine at a time on a volume, whoever asks: a lock of the kernel, which a killed holder cannot keep.

The file stays; what counts is who holds it open (flock). It holds how far the build is, for those who wait.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.generation.engine_source import Building

_BYTES = 1024  # written at once, so that a reader sees one state or the next


class HeldLock:
    """A lock that this process has. `descriptor`: given to a child, the child keeps it too."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def tell(self, building: Building) -> None:
        """Writes how far the build is; a full disk costs those who wait no more than that."""
        text = json.dumps([building.module, building.percent, building.seconds_left]).encode()[:_BYTES]
        with contextlib.suppress(OSError):
            os.pwrite(self.descriptor, text.ljust(_BYTES), 0)


@contextmanager
def build_lock(path: Path, wait: Callable[[Building | None], None]) -> Iterator[HeldLock]:
    """Holds the lock of `path`. While another process does, `wait` is called again and again with what it tells.

    `wait` pauses, and ends the waiting by raising. Raises OSError where the file cannot be had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait(_told(descriptor))
        yield HeldLock(descriptor)
    finally:
        os.close(descriptor)


def _told(descriptor: int) -> Building | None:
    try:
        return Building(*json.loads(os.pread(descriptor, _BYTES, 0)))
    except (ValueError, TypeError):
        return None
