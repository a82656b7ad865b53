"""Memory of a GPU by NVML (nvidia-ml-py, extra `gpu`), over all processes.

NVML asks the driver and touches no CUDA context, so any thread may call it while the engine runs.
"""

import logging
from collections.abc import Mapping
from typing import Any

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
