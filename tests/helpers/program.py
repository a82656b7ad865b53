"""A Python program of ours in its own process, with its output."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from running_server import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
PROCESS_S = 180.0  # long enough to import torch on a busy machine


class Program:
    """A started `python ...`; `output` collects stdout and stderr."""

    exit_timeout_s = PATIENCE_S
    command: Sequence[str] = ()  # a wrapper of python, with its arguments

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*self.command, sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
        self.process.stdout.close()

    def wait_end(self) -> int:
        """Waits for the end of process and output, and returns the exit code."""
        code = self.process.wait(self.exit_timeout_s)
        self._reader.join(PATIENCE_S)
        return code


class Server(Program):
    """A started `python -m server`."""

    exit_timeout_s = PROCESS_S

    def __init__(self, *arguments: str, **environment: str) -> None:
        super().__init__("-W", "error", "-m", "server", "--port", "0", *arguments, **environment)

    def wait_ready(self) -> str:
        """Waits until the server is ready, and returns its address."""
        wait_until(
            lambda: "curl -s" in self.output or self.process.poll() is not None, "the curl line", within_s=PROCESS_S
        )
        match = re.search(r"curl -s (http://127\.0\.0\.1:\d+)/generate", self.output)
        assert match, self.output
        return match.group(1)


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """Yields the address of a ready `python -m server`, which must exit with 0 on SIGTERM."""
    server = Server(*flags)
    try:
        yield server.wait_ready()
    finally:
        server.process.terminate()
        code = server.wait_end()
    assert code == 0, server.output
