"""Chooses device and precision of an engine, and records the reasons."""

import torch

from engines.device.hardware import why_no_gpu
from engines.errors import BackendError

# Dtype of weights and activations. int8 (CPU) and fp8 (GPU): the decoder's wide convolutions run in 8 bits.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}


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
