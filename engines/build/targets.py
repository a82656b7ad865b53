"""Resolves `--gpu`, `--precision` and `--vendor` to a target for this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

from engines.artifacts.manifest import NATIVE
from engines.backends.openvino import CpuPrecision, check_cpu
from engines.device.hardware import Capability, Machine, capability_text
from engines.errors import BuildError
from engines.models.dcae import AutoencoderConfig

GPUS: Mapping[str, Capability] = {"h100": (9, 0), "rtx4090": (8, 9)}
_MEMORY: Mapping[str, float] = {"h100": 80e9, "rtx4090": 24e9}
VENDORS = ("tensorrt", NATIVE)
CPU_PRECISIONS = ("fp32", "bf16")
NATIVE_PRECISIONS = ("bf16", "fp8")
GPU_PRECISIONS = ("fp16", "bf16", "fp8", "fp32")
_LIVE_TENSORS = 4.5  # at full resolution in the decoder: TensorRT plans 1.2 GB for one 1024x1024 row in fp16
_AUTOENCODER_SHARE = 1 / 8  # of the card's memory
# The lowest compute capability with the arithmetic.
_NEEDS: Mapping[str, Capability] = {"fp32": (7, 5), "fp16": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class Target:
    """The device and the compiler of an engine."""

    gpu: str  # value of --gpu
    backend: str  # "openvino", "tensorrt" or "cuda-graph"
    vendor: str  # the package that compiles: openvino, tensorrt, tensorrt_rtx; or native
    capability: Capability | None  # None: the CPU
    executable: bool  # on the machine of the build
    memory: float | None = None  # bytes of the card

    def autoencoder_batches(
        self, batches: Sequence[int], size: tuple[int, int], config: AutoencoderConfig, item: int
    ) -> tuple[int, ...]:
        """Returns the `batches` whose activations (`item` bytes a number) take an eighth of the memory at most."""
        if self.memory is None:
            return tuple(batches)
        widths, depths = config.decoder_block_out_channels, config.decoder_layers_per_block
        first = next(width for width, depth in zip(widths, depths, strict=True) if depth)
        row = size[0] * size[1] * first * item * _LIVE_TENSORS
        return tuple(batch for batch in batches if batch * row <= self.memory * _AUTOENCODER_SHARE) or (1,)


def resolve(
    gpu: str,
    precision: str,
    machine: Machine,
    installed: Callable[[str], object | None] = find_spec,
    vendor: str | None = None,
) -> Target:
    """Returns the target. vendor: one of VENDORS; None is TensorRT if a package of it is installed, else native.

    Raises BuildError with the allowed values or the missing package; BackendError on a CPU without `precision`.
    """
    if vendor not in (None, *VENDORS):
        raise BuildError(f"vendor: got {vendor!r}, allowed {', '.join(VENDORS)}")
    if gpu == "cpu":
        if vendor is not None:
            raise BuildError(f"vendor: got {vendor!r}, and a CPU's engines are OpenVINO's; leave it out")
        if precision not in CPU_PRECISIONS:
            allowed = ", ".join(CPU_PRECISIONS)
            raise BuildError(f"precision: got {precision!r}, a CPU engine is built in {allowed}")
        _require("openvino", "openvino", installed)
        check_cpu(cast(CpuPrecision, precision))
        return Target(gpu, "openvino", "openvino", None, executable=True)
    if vendor == NATIVE or (vendor is None and not (installed("tensorrt") or installed("tensorrt_rtx"))):
        return _native(gpu, precision, machine, installed)
    if precision not in GPU_PRECISIONS:
        raise BuildError(f"precision: got {precision!r}, allowed {', '.join(GPU_PRECISIONS)}")
    capability = _capability(gpu, machine)
    if capability < _NEEDS[precision]:
        raise BuildError(
            f"precision: compute capability {capability_text(capability)} has no {precision} arithmetic, "
            f"{capability_text(_NEEDS[precision])} or newer has; use fp16"
        )
    executable = machine.capability == capability
    memory = machine.memory if executable else _MEMORY[gpu]
    if executable and (installed("tensorrt") or not installed("tensorrt_rtx")):
        _require("tensorrt", "tensorrt", installed)
        return Target(gpu, "tensorrt", "tensorrt", capability, executable=True, memory=memory)
    if capability == (9, 0):
        raise BuildError(
            f"gpu: TensorRT builds for an H100 on an H100 only, and this machine has {machine.label}; "
            "TensorRT for RTX, which can build ahead of time, does not know compute capability 9.0; use --vendor native"
        )
    _require("tensorrt_rtx", "tensorrt-rtx", installed)
    return Target(gpu, "tensorrt", "tensorrt_rtx", capability, executable=executable, memory=memory)


def _native(gpu: str, precision: str, machine: Machine, installed: Callable[[str], object | None]) -> Target:
    if precision not in NATIVE_PRECISIONS:
        raise BuildError(
            f"precision: got {precision!r}, a native engine is built in {', '.join(NATIVE_PRECISIONS)}; TensorRT "
            "takes others, and is not asked for or not installed"
        )
    capability = _capability(gpu, machine)
    if capability not in GPUS.values():
        known = ", ".join(f"{name} ({capability_text(needed)})" for name, needed in GPUS.items())
        raise BuildError(f"gpu: native engines are built for {known}, and this machine has {machine.label}")
    if not installed("triton"):
        raise BuildError("build: the package triton is missing; pip install triton")
    return Target(gpu, "cuda-graph", NATIVE, capability, executable=False)


def _capability(gpu: str, machine: Machine) -> Capability:
    if gpu in GPUS:
        return GPUS[gpu]
    if gpu != "native":
        raise BuildError(f"gpu: got {gpu!r}, allowed {', '.join(GPUS)}, native, cpu")
    if machine.capability is None:
        raise BuildError(
            f"--gpu native needs an NVIDIA GPU and none was found; use {', '.join(GPUS)} (ahead of time) or cpu"
        )
    return machine.capability


def _require(package: str, extra: str, installed: Callable[[str], object | None]) -> None:
    if not installed(package):
        raise BuildError(f"build: the package {package} is missing; pip install '.[{extra}]'")
