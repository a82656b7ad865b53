"""Chooses the device on which an engine runs."""

import torch

from engines.device.hardware import why_no_gpu
from engines.errors import BackendError


def choose_device(requested: str | None, reasons: dict[str, str]) -> torch.device:
    """Returns the device of --device, or a GPU if torch sees one; adds the reason. Raises BackendError."""
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
