"""Runs build_engine.py as a process, reads its progress from stderr, and ends it."""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from server.errors import BuildFailedError
from server.generation.engine_source import Building

DISK_FULL = 75  # build_engine.py's exit code; EX_TEMPFAIL of sysexits.h
KILL_S = 5.0
_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")  # build_engine.py's line before each step: done, total, name of the next
_KEPT_LINES = 20

logger = logging.getLogger("server.build")


class BuildProcess:
    """One run of a builder. `run` blocks; another thread may call `stop`."""

    def __init__(self, command: Sequence[str], on_progress: Callable[[Building], None]) -> None:
        self._command = command
        self._on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, keep: Sequence[int] = ()) -> None:
        """Runs the builder to its end. It inherits the descriptors `keep`, such as a lock's.

        Raises BuildFailedError with the builder's own reason.
        """
        with self._guard:
            if self._stopped:
                raise BuildFailedError("the server is shutting down", retryable=True)
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the manifest, which the folder holds too
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=tuple(keep),
                start_new_session=True,  # so that `stop` reaches its children
            )
        began = time.monotonic()
        last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stderr is not None
        with process.stderr as lines:
            for line in map(str.strip, lines):
                if step := _STEP.fullmatch(line):
                    self._on_progress(_progress(int(step[1]), int(step[2]), step[3], time.monotonic() - began))
                elif line:
                    last_lines.append(line)
                    logger.debug("builder: %s", line)
        code = process.wait()
        if code == 0:
            return
        if self._stopped:
            raise BuildFailedError("the server is shutting down", retryable=True)
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
            raise BuildFailedError(f"the builder was killed by {name}", retryable=True)
        reason = last_lines[-1] if last_lines else f"the builder ended with code {code} and said nothing"
        raise BuildFailedError(reason.removeprefix("build_engine.py: "), retryable=code == DISK_FULL)

    def stop(self) -> None:
        """Ends the builder and its children."""
        with self._guard:
            self._stopped = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(KILL_S)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def _progress(done: int, total: int, step: str, seconds: float) -> Building:
    """Estimates as if all steps took equally long. The first ones do not, so no seconds before the second step."""
    left = seconds / done * (total - done) if done else None
    return Building(step, 100 * done / max(total, 1), left)
