"""A program of ours in a process of its own, with what it prints."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from running_server import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """`python ...`, started; `output` collects both of its streams as they come."""

    end_within_s = PATIENCE_S

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
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
        """The exit code, with all output read."""
        code = self.process.wait(self.end_within_s)
        self._reader.join(PATIENCE_S)
        return code
