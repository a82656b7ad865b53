"""Resources of a process: memory, open files, threads, processor time."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

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
        process = psutil.Process(pid)
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info().rss
            return ProcessState(at, memory, process.num_fds(), process.num_threads(), times.user + times.system)
    except psutil.NoSuchProcess as error:  # a zombie, too
        raise BenchError(f"process {pid} is gone") from error


def in_span(states: Sequence[ProcessState], begin: float, end: float) -> list[ProcessState]:
    return [state for state in states if begin <= state.at < end]
