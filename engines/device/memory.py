"""Memory: of a GPU by NVML (nvidia-ml-py, extra `gpu`), over all processes, what a device has left, what is freed.

NVML asks the driver and touches no CUDA context, so any thread may call it while the engine runs.
"""

import contextlib
import ctypes
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("engines.device")


class Card:
    """One GPU in NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def memory_bytes(self) -> Mapping[str, int]:
        """Returns `used` and `total` in bytes; empty if the driver does not answer."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            logger.debug("no memory of the GPU: %s", error)
            return {}
        return {"used": int(memory.used), "total": int(memory.total)}


def open_card(uuid: str) -> Card | None:
    """Returns the card with this UUID of CUDA; None if NVML is not installed or does not know it."""
    try:
        import pynvml
    except ImportError:
        logger.debug("nvidia-ml-py is not installed")
        return None
    try:
        pynvml.nvmlInit()
        return Card(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError as error:
        logger.debug("NVML: %s", error)
        return None


def available_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process can still take on a device; None if the system does not tell.

    On a CPU: MemAvailable, and no more than the limit of the cgroup leaves. `root` holds /proc and /sys.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    bounds = [] if found is None else [1024 * int(found[1])]
    for folder, limit, used in _CGROUPS:
        most, held = _read(root / folder / limit).strip(), _read(root / folder / used).strip()
        cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(root / folder / "memory.stat"), re.MULTILINE)
        if most.isdecimal() and held.isdecimal():
            bounds.append(max(int(most) - int(held) + (0 if cached is None else int(cached[1])), 0))
    return min(bounds, default=None)


def return_freed_memory() -> None:
    """Returns to the system what malloc keeps of freed tensors; does nothing without glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


# Folder of a container's own group, file of its limit, file of its use: of version 2, of version 1.
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
