"""Facts of the machine that a measurement ran on."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REVISION = "REVISION"  # file in the root of code that was packed from a checkout (bench.acceptance.kit)


def host_facts() -> dict[str, object]:
    """Returns day, processor, usable cores, load average of five minutes, memory, versions and code revision."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[1], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "revision": _revision(),
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _revision() -> str | None:
    """The commit, marked where files differ from it; that of packed code in its file; None without either."""
    told = Path(__file__).parents[2] / REVISION
    if told.is_file():
        return told.read_text().strip()
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
