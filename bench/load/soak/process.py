"""Resources of a process: memory, open files, threads, processor time."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.errors import BenchError


@dataclass(frozen=True, slots=True)
class ProcessState:
    """Resources at one moment. `at`: seconds from the start. `cpu_s`: user and system time of the process."""

    at: float
    memory_bytes: int
    files: int
    threads: int
    cpu_s: float


def process_state(pid: int, at: float) -> ProcessState:
    """Returns the resources of a process. Raises BenchError if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError) as error:
        raise BenchError(f"process {pid} is gone") from error
    memory, threads = (re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE) for name in ("VmRSS", "Threads"))
    if memory is None or threads is None:
        raise BenchError(f"process {pid} has ended")
    seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return ProcessState(at, int(memory[1]) * 1024, files, int(threads[1]), seconds)


def in_span(states: Sequence[ProcessState], begin: float, end: float) -> list[ProcessState]:
    return [entry for entry in states if begin <= entry.at < end]
