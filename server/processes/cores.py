"""How many threads compute on a CPU, and how they wait for one another: told to OpenMP by its own variables, before the
library is there.

A container with a quota of one core sees all cores of its host; two threads in it run half of each period, and stand
still for the rest. And a thread that spins while it waits for one that the kernel has put aside burns the very core
that the other needs: with a busy neighbour, a picture took ten times as long.
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

THREADS = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them: somebody has decided


class Cores(NamedTuple):
    """`threads`, at least 1, and why."""

    threads: int
    reason: str


def configure_openmp(environment: MutableMapping[str, str], root: Path = Path("/")) -> Cores:
    """Tells OpenMP what was not told already, in `environment`, and says what holds."""
    given = environment.get(THREADS, "")
    if given:
        first = given.partition(",")[0].strip()  # the rest is for nested regions, which there are none of
        found = Cores(int(first) if first.isdecimal() else 1, f"{given}: {THREADS} says so")
    else:
        found = usable_cores(root)
        environment[THREADS] = str(found.threads)
    if not any(environment.get(name) for name in WAITING):
        environment[WAITING[0]] = "PASSIVE"
    return found


def usable_cores(root: Path = Path("/")) -> Cores:
    """What the affinity and the cgroup's quota leave, whole cores. `root`: where /proc and /sys are."""
    allowed = len(os.sched_getaffinity(0))
    quota = min(_quotas(root), default=None)
    if quota is None or quota >= allowed:
        return Cores(allowed, f"{allowed}: the cores that this process may run on")
    count = max(1, int(quota))
    return Cores(count, f"{count}: the cgroup's quota is {quota:g}, of {allowed} cores that this process may run on")


def _quotas(root: Path) -> Iterator[float]:
    """In cores, of this process's cgroup and those around it, as far as they are seen from here."""
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")  # proc_pid_mountinfo(5)
        before, after = left.split(), right.split()
        if len(before) < 5 or len(after) < 3 or not after[0].startswith("cgroup"):
            continue
        unified = after[0] == "cgroup2"
        if not unified and "cpu" not in after[2].split(","):
            continue
        named = [path for _, names, path in groups if (names == "" if unified else "cpu" in names.split(","))]
        top = root / before[4].lstrip("/")
        for path in named:
            yield from filter(None, (_quota(folder, unified=unified) for folder in _upwards(top, before[3], path)))


def _upwards(top: Path, mounted: str, path: str) -> Iterator[Path]:
    """The folder of the cgroup `path` where the cgroup `mounted` is at `top`, and those above it."""
    inside = path.removeprefix(mounted.rstrip("/")) if path.startswith(mounted.rstrip("/")) else "/"
    if ".." in inside.split("/"):  # of a namespace around ours
        inside = "/"
    folder = top / inside.strip("/")
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _quota(folder: Path, *, unified: bool) -> float | None:
    if unified:
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:  # max, -1, or no such file
        return None
    return int(quota) / int(period)


def threads_per_worker(environment: Mapping[str, str], workers: int) -> str:
    """OMP_NUM_THREADS of each of so many processes."""
    return environment.get(THREADS) or str(max(1, usable_cores().threads // workers))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
