"""Runs `python -m server` as a child process on a free port."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"^curl -s (http://\S+)/generate ", re.MULTILINE)
START_TIMEOUT_S = 600.0  # a large checkpoint is read, an engine compiled
STOP_TIMEOUT_S = 60.0


@dataclass
class RunningServer:
    """A ready server at `url`."""

    url: str
    process: subprocess.Popen[bytes]
    start_seconds: float


@contextlib.contextmanager
def running_server(flags: Sequence[str]) -> Iterator[RunningServer]:
    """Starts a server with these flags, yields it when ready, and ends it by SIGTERM.

    Raises BenchError with the end of its log if it does not start, or does not exit with code 0.
    """
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        command = [sys.executable, "-m", "server", "--port", "0", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=log, stderr=log)
        try:
            yield RunningServer(_wait_ready(process, log.fileno(), began), process, time.perf_counter() - began)
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code != 0:
            raise BenchError(f"the server left with code {code}:\n{log_tail(log.fileno())}")


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_ready(process: subprocess.Popen[bytes], log: int, began: float) -> str:
    while time.perf_counter() < began + START_TIMEOUT_S:
        ended = process.poll() is not None
        match = READY.search(_text(log))
        if match:
            return match.group(1)
        if ended:
            raise BenchError(f"the server did not start (code {process.returncode}):\n{log_tail(log)}")
        time.sleep(0.02)
    raise BenchError(f"the server was not ready within {START_TIMEOUT_S:g} s:\n{log_tail(log)}")


def _text(log: int) -> str:
    return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")


def log_tail(log: int) -> str:
    """Returns the last lines of a file by its descriptor."""
    return "\n".join(_text(log).splitlines()[-30:])
