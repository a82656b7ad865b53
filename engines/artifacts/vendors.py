"""Vendors of engines: the packages they need, their arguments of build_engine.py, and what they serve."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from engines.artifacts.manifest import NATIVE
from engines.device.hardware import Capability
from engines.kernels.launch_code import COMPILERS, compiled_folder

Installed = Callable[[str], object | None]

_EXPORT = ("onnx", "onnxscript")
_CARD_PRECISIONS = ("bf16", "fp8", "fp16", "fp32")


@dataclass(frozen=True)
class Vendor:
    """An entry of VENDORS. `name` and `backend` stand in its manifests."""

    name: str
    backend: str
    device: str  # cpu or cuda
    precisions: tuple[str, ...]
    arguments: tuple[str, ...]  # of build_engine.py
    runs_with: tuple[str, ...]  # packages, as imported
    builds_with: tuple[str, ...]  # packages beside them
    never_on: tuple[Capability, ...] = ()
    only_on: tuple[Capability, ...] = ()  # empty: on any other card
    launches_through_c: bool = False  # a build needs a C compiler, or what it would compile
    gives_way_to: str | None = None  # if this package is installed, build_engine.py takes another vendor

    def can_run(self, installed: Installed = find_spec) -> bool:
        gives_way = self.gives_way_to is not None and installed(self.gives_way_to) is not None
        return not gives_way and all(installed(name) is not None for name in self.runs_with)

    def missing(self, installed: Installed = find_spec, which: Installed = shutil.which) -> tuple[str, ...]:
        """Returns what a build needs and this machine lacks: packages, and a C compiler (`gcc or clang`)."""
        packages = tuple(name for name in (*self.runs_with, *self.builds_with) if installed(name) is None)
        if self.launches_through_c and compiled_folder() is None and not any(map(which, COMPILERS)):
            return (*packages, " or ".join(COMPILERS))
        return packages

    def serves(self, device: str, capability: Capability | None, precision: str) -> bool:
        fits = capability not in self.never_on and capability in (self.only_on or (capability,))
        return fits and device == self.device and precision in self.precisions


# In the order of preference. If several can run, the fastest one serves.
VENDORS = (
    Vendor("openvino", "openvino", "cpu", ("fp32", "bf16"), ("--gpu", "cpu"), ("openvino",), _EXPORT),
    Vendor("tensorrt", "tensorrt", "cuda", _CARD_PRECISIONS, ("--gpu", "native"), ("tensorrt",), _EXPORT),
    Vendor(
        *("tensorrt_rtx", "tensorrt", "cuda", _CARD_PRECISIONS, ("--gpu", "native"), ("tensorrt_rtx",), _EXPORT),
        never_on=((9, 0),),
        gives_way_to="tensorrt",
    ),
    Vendor(
        *(NATIVE, "cuda-graph", "cuda", ("bf16", "fp8"), ("--gpu", "native", "--vendor", NATIVE), ("triton",), ()),
        only_on=((9, 0), (8, 9)),  # those of build_engine.py (engines/build/targets.py)
        launches_through_c=True,
    ),
)
