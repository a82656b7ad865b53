"""A fake of nvidia-ml-py's pynvml with one card, whose used memory tests set."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

UUID = "00000000-1111-2222-3333-444444444444"
TOTAL = 80 * 2**30


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml(ModuleType):
    """One card with `used` bytes in use; without a driver every call fails."""

    NVMLError = NVMLError

    def __init__(self, *, used: int = 3 * 2**30, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.used, self.driver = used, driver

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        if uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802 - NVML's name
        if not self.driver or handle != f"GPU-{UUID}":
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=self.used, free=TOTAL - self.used, total=TOTAL)


def install(patch: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    patch.setitem(sys.modules, "pynvml", nvml)
    return nvml
