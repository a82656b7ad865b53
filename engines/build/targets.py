"""What `--gpu` and `--precision` may mean together on this machine, and by which vendor's compiler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

from engines.backends.openvino import CpuPrecision, check_cpu
from engines.device.hardware import Capability, Machine, dotted
from engines.errors import BuildError

GPUS: Mapping[str, Capability] = {"h100": (9, 0), "rtx4090": (8, 9)}
_MEMORY: Mapping[str, float] = {"h100": 80e9, "rtx4090": 24e9}
CPU_PRECISIONS = ("fp32", "bf16")
GPU_PRECISIONS = ("fp16", "bf16", "fp8", "fp32")
# The first compute capability with the arithmetic.
_NEEDS: Mapping[str, Capability] = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class Target:
    """Where an engine is to run and what compiles it."""

    gpu: str  # as asked for
    backend: str  # "openvino" or "tensorrt"
    vendor: str  # the package that compiles: openvino, tensorrt, tensorrt_rtx
    capability: Capability | None  # None: the CPU
    executable: bool  # here, where it is built
    memory: float | None = None  # bytes of the card


def resolve(
    gpu: str, precision: str, machine: Machine, installed: Callable[[str], object | None] = find_spec
) -> Target:
    """Raises BuildError naming what is allowed here, or what is missing; BackendError on a CPU without `precision`."""
    if gpu == "cpu":
        if precision not in CPU_PRECISIONS:
            allowed = ", ".join(CPU_PRECISIONS)
            raise BuildError(f"precision: got {precision!r}, a CPU engine is built in {allowed}")
        _need("openvino", "openvino", installed)
        check_cpu(cast(CpuPrecision, precision))
        return Target(gpu, "openvino", "openvino", None, executable=True)
    if precision not in GPU_PRECISIONS:
        raise BuildError(f"precision: got {precision!r}, allowed {', '.join(GPU_PRECISIONS)}")
    capability = _capability(gpu, machine)
    if capability < _NEEDS[precision]:
        raise BuildError(
            f"precision: compute capability {dotted(capability)} has no {precision} arithmetic, "
            f"{dotted(_NEEDS[precision])} or newer has; use fp16"
        )
    on_the_card = machine.capability == capability
    memory = machine.memory if on_the_card else _MEMORY[gpu]
    if on_the_card and (installed("tensorrt") or not installed("tensorrt_rtx")):
        _need("tensorrt", "tensorrt", installed)
        return Target(gpu, "tensorrt", "tensorrt", capability, executable=True, memory=memory)
    if capability == (9, 0):
        raise BuildError(
            f"gpu: TensorRT builds for an H100 on an H100 only, and this machine has {machine.words}; "
            "TensorRT for RTX, which can build ahead of time, does not know compute capability 9.0"
        )
    _need("tensorrt_rtx", "tensorrt-rtx", installed)
    return Target(gpu, "tensorrt", "tensorrt_rtx", capability, executable=on_the_card, memory=memory)


def _capability(gpu: str, machine: Machine) -> Capability:
    if gpu in GPUS:
        return GPUS[gpu]
    if gpu != "native":
        raise BuildError(f"gpu: got {gpu!r}, allowed {', '.join(GPUS)}, native, cpu")
    if machine.capability is None:
        raise BuildError(f"gpu: native means the card of this machine, which has {machine.words}; here: rtx4090, cpu")
    return machine.capability


def _need(package: str, extra: str, installed: Callable[[str], object | None]) -> None:
    if not installed(package):
        raise BuildError(f"build: the package {package} is missing; pip install '.[{extra}]'")
