"""CPU time and context switches of a server and its children: Linux's counters, which other processes do not count in.

They vary less than latencies on a busy machine, though a crowded cache makes every instruction slower.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")  # of proc(5)


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Since the processes began: seconds in user and system mode, and switches of their living threads."""

    seconds: float
    switches: int

    @classmethod
    def of_session(cls, session: int) -> Self:
        """Returns the sum over the processes of a session, which the leader with this id began; 0 without /proc."""
        ticks = switches = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(words[3]) == session:
                    ticks += int(words[11]) + int(words[12])  # utime, stime
                    switches += _switches(folder)
        return cls(ticks / TICKS, switches)

    def since(self, earlier: "CpuUse") -> "CpuUse":
        return CpuUse(self.seconds - earlier.seconds, self.switches - earlier.switches)


def _switches(folder: Path) -> int:
    lines = [line for path in folder.glob("task/*/status") for line in path.read_text().splitlines()]
    return sum(int(line.rpartition(":")[2]) for line in lines if "voluntary_ctxt_switches" in line)
