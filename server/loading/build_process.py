"""build_engine.py in a process of its own: started, listened to, ended. What it says of its steps becomes progress."""

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
_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")  # build_engine.py's line before each step: those done, all, the next
_KEPT_LINES = 20

logger = logging.getLogger("server.build")


class BuildProcess:
    """One run of a builder; `run` blocks, `stop` may be called from another thread."""

    def __init__(self, command: Sequence[str], told: Callable[[Building], None]) -> None:
        self._command = command
        self._told = told
        self._process: subprocess.Popen[str] | None = None
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, keep: Sequence[int] = ()) -> None:
        """Runs the builder to its end. keep: descriptors that it inherits, a lock's for one.

        Raises BuildFailedError with the builder's own reason.
        """
        with self._guard:
            if self._stopped:
                raise BuildFailedError("the server is shutting down", retryable=True)
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the manifest, which is in the folder
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=tuple(keep),
                start_new_session=True,  # so that its own children end with it
            )
        began = time.monotonic()
        said: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stderr is not None
        with process.stderr as lines:
            for line in map(str.strip, lines):
                if step := _STEP.fullmatch(line):
                    self._told(_progress(int(step[1]), int(step[2]), step[3], time.monotonic() - began))
                elif line:
                    said.append(line)
                    logger.debug("builder: %s", line)
        code = process.wait()
        if code == 0:
            return
        if self._stopped:
            raise BuildFailedError("the server is shutting down", retryable=True)
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
            raise BuildFailedError(f"the builder was killed by {name}", retryable=True)
        reason = said[-1] if said else f"the builder ended with code {code} and said nothing"
        raise BuildFailedError(reason.removeprefix("build_engine.py: "), retryable=code == DISK_FULL)

    def stop(self) -> None:
        """Ends the builder and all that it started."""
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
    """Steps are taken as equally long, which the first of them are not: seconds are told from the second on."""
    left = seconds / done * (total - done) if done else None
    return Building(step, 100 * done / max(total, 1), left)
