"""Sets OpenMP's variables before its library loads: the number of compute threads, and how they wait.

A container with a quota of one core sees all cores of its host. Two threads in it run for half of each period and are
stopped for the rest. A thread that spins while it waits takes the core of a thread that the kernel has paused: with a
busy neighbour, an image took ten times as long.
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

THREADS = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them set: the user has decided


class Cores(NamedTuple):
    """The number of threads, at least 1, and the reason."""

    threads: int
    reason: str


def configure_openmp(environment: MutableMapping[str, str], root: Path = Path("/")) -> Cores:
    """Sets the variables that `environment` lacks. Returns the resulting threads and why."""
    setting = environment.get(THREADS, "")
    if setting:
        first = setting.partition(",")[0].strip()  # the rest is for nested regions, which torch does not use
        cores = Cores(int(first) if first.isdecimal() else 1, f"{setting}: {THREADS} says so")
    else:
        cores = usable_cores(root)
        environment[THREADS] = str(cores.threads)
    if not any(environment.get(name) for name in WAITING):
        environment[WAITING[0]] = "PASSIVE"
    return cores


def usable_cores(root: Path = Path("/")) -> Cores:
    """Returns the whole cores that affinity and cgroup quota allow. `root` holds /proc and /sys."""
    allowed = len(os.sched_getaffinity(0))
    quota = min(_quotas(root), default=None)
    if quota is None or quota >= allowed:
        return Cores(allowed, f"{allowed}: the cores that this process may run on")
    count = max(1, int(quota))
    return Cores(count, f"{count}: the cgroup's quota is {quota:g}, of {allowed} cores that this process may run on")


def _quotas(root: Path) -> Iterator[float]:
    """Yields the quotas, in cores, of this process's cgroup and its visible parents."""
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
    """Yields the folder of the cgroup `path`, then its parents up to `top`, where the cgroup `mounted` is mounted."""
    inside = path.removeprefix(mounted.rstrip("/")) if path.startswith(mounted.rstrip("/")) else "/"
    if ".." in inside.split("/"):  # of an outer namespace
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
    """Returns OMP_NUM_THREADS for each of `workers` processes."""
    return environment.get(THREADS) or str(max(1, usable_cores().threads // workers))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
