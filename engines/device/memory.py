"""How full a card is, by NVML (nvidia-ml-py, extra `gpu`): all processes on it, not only this one.

NVML asks the driver and touches no CUDA context, so any thread may ask while the engine works.
"""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("engines.device")


class Card:
    """One GPU, as NVML knows it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def memory_bytes(self) -> Mapping[str, int]:
        """used and total; nothing where the driver does not answer."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            logger.debug("no memory of the GPU: %s", error)
            return {}
        return {"used": int(memory.used), "total": int(memory.total)}


def open_card(uuid: str) -> Card | None:
    """The card with this UUID, as CUDA names it; None where NVML is not installed or does not know the card."""
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
