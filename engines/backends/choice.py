"""Chooses device and precision of an engine, and records the reasons."""

import platform

import torch

from engines.backends.base import ModuleName
from engines.device.hardware import why_no_gpu
from engines.errors import BackendError

# int8 (CPU) and fp8 (GPU) are bf16 with some products in 8 bits.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}

# What --precision int8 runs in 8 bits; the transformer if that is faster on this CPU.
INT8_MODULES: frozenset[ModuleName] = frozenset({"decoder", "transformer", "controlled"})


def choose_device(requested: str | None, reasons: dict[str, str]) -> torch.device:
    """Returns the device; None takes a GPU if torch sees one. Adds the reason. Raises BackendError."""
    if requested is None:
        available = torch.cuda.is_available()
        reasons["device"] = "cuda: a GPU is present" if available else "cpu: torch sees no GPU"
        return torch.device("cuda", 0) if available else torch.device("cpu")
    kind, _, index = requested.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise BackendError(f"device: got {requested!r}, allowed cpu, cuda, cuda:<index>")
    count = torch.cuda.device_count()
    if kind == "cuda" and count == 0:
        raise BackendError(f"device: got {requested!r}, but {why_no_gpu()}")
    if kind == "cuda" and int(index or 0) >= count:
        raise BackendError(
            f"device: got {requested!r}, but torch sees {count} GPUs; allowed cuda:0 to cuda:{count - 1}"
        )
    reasons["device"] = f"{requested}: asked for"
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device(kind)


def has_bf16_products() -> bool:
    """Returns whether this CPU multiplies bf16 by instructions; emulated, that takes four times as long as fp32."""
    if platform.machine() != "x86_64":  # oneDNN asks Arm's CPUs for the instructions, others for AVX512 alone
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own
        return bool(has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(precision: str, device: torch.device, reasons: dict[str, str]) -> torch.dtype:
    """Returns the dtype of weights and activations in one of PRECISIONS; adds to the reason of the precision."""
    if device.type != "cpu" or PRECISIONS[precision] != torch.bfloat16 or has_bf16_products():
        return PRECISIONS[precision]
    if precision == "int8":
        reasons["precision"] += "; what is not in 8 bits is in fp32, because this CPU has no bf16 products"
        return torch.float32
    reasons["precision"] += "; slow here, because this CPU has no bf16 products: fp32 and int8 are faster"
    return torch.bfloat16


def default_precision(device: torch.device) -> str:
    return "fp32" if device.type == "cpu" else "bf16"


def choose_precision(requested: str | None, device: torch.device, backend: str, reasons: dict[str, str]) -> str:
    """Returns one of PRECISIONS; None takes the device's default. Adds the reason. Raises BackendError."""
    if requested is None:
        chosen = default_precision(device)
        why = "exact, and the CPU's default" if chosen == "fp32" else "as Sprint was trained"
        reasons["precision"] = f"{chosen}: {why}"
        return chosen
    if requested not in PRECISIONS:
        raise BackendError(f"precision: got {requested!r}, allowed {', '.join(PRECISIONS)}")
    if requested == "fp8" and (backend, device.type) != ("cuda-graph", "cuda"):
        raise BackendError(
            f"precision: fp8 without a built engine is the cuda-graph backend's on a GPU, and this is {backend} on "
            f"{device.type}; use bf16"
        )
    if requested == "int8" and (backend, device.type) != ("eager", "cpu"):
        raise BackendError(
            f"precision: int8 is the eager backend's on a CPU, and this is {backend} on {device.type}; use bf16"
        )
    reasons["precision"] = f"{requested}: asked for"
    return requested
