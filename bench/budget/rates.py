"""Projects kernel times to a card from times measured on an H100.

A kernel takes a fixed time, and that of its arithmetic or traffic at the share of the peak that it reached on an H100.
Other cards are assumed to reach the same share.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.budget.events import Launch, Transfer
from bench.roofline.gpu_specs import GIGA, H100, H200, RTX4090, Device
from bench.roofline.op_counter import Call, Kind

CARDS: Mapping[str, Device] = {"H100": H100, "H200": H200, "RTX 4090": RTX4090}

FIXED_MS = 0.001  # of a kernel in a graph: the smallest ones take 0.9 to 1.5 microseconds
HOST_MS = 0.017  # of a launch outside of graphs: 25 ms for the 1,480 of the eager text stage
COPY_MS = 0.005  # of starting one copy
PINNED, PAGEABLE = 45 * GIGA, 9 * GIGA  # bytes a second: 3 MB in 0.07 and in 0.35 ms


@dataclass(frozen=True)
class Measured:
    """All launches of a kernel in one stage: milliseconds on an H100, work as `kernels.call_of` counts it."""

    ms: float
    launches: int
    gflop: float
    gigabytes: float


# An H100 80GB HBM3, torch 2.11, 27 November 2026: 0.6B, 1024x1024, batch 1, one step, bf16, by torch's profiler. Text
# ran 24 tokens. Products are cuBLAS's and cuDNN's, all shapes of a stage together.
_MEASURED: Mapping[tuple[str, str], Measured] = {
    ("text", "_skinny_product"): Measured(1.4338, 78, 113.85, 3.7184),
    ("text", "_capped_attention"): Measured(0.3234, 26, 1.62, 0.0321),
    ("text", "_gemma_norm"): Measured(0.2693, 53, 0, 0.1469),
    ("text", "product"): Measured(0.1926, 26, 15.7, 0.5014),
    ("denoise", "product"): Measured(1.6300, 150, 694.02, 1.7508),
    # Three of its shapes by torch._scaled_mm, each alone: 1024x1152x3456, x5760 and 1024x2880x1152.
    ("denoise", "product, fp8"): Measured(0.0400, 3, 28.54, 0.0405),
    ("denoise", "_silu_product"): Measured(0.8356, 28, 380.51, 0.7683),
    ("denoise", "_modulated_norm"): Measured(0.3080, 85, 0, 0.7318),
    ("denoise", "_gated_depthwise"): Measured(0.3003, 28, 2.97, 0.4987),
    ("denoise", "_apply"): Measured(0.2610, 28, 2.11, 0.1662),
    ("denoise", "_context"): Measured(0.1480, 28, 2.11, 0.1664),
    ("denoise", "_cross_attention"): Measured(0.1353, 28, 39.64, 0.1709),
    ("denoise", "_row_rms"): Measured(0.1125, 56, 0, 0.1323),
    ("denoise", "_key_norm"): Measured(0.0132, 1, 0, 0.0388),
    ("decode", "_convolution"): Measured(8.4587, 18, 5625.78, 6.7138),
    ("decode", "_convolution, fp8"): Measured(5.5890, 18, 5625.78, 4.9720),
    ("decode", "_upsampling"): Measured(1.2815, 5, 790.27, 0.7941),
    ("decode", "_silu_product"): Measured(0.8251, 9, 463.86, 0.8495),
    ("decode", "product"): Measured(0.8147, 29, 522.44, 1.1116),
    ("decode", "_gated_depthwise"): Measured(0.6991, 9, 5.89, 0.9827),
    ("decode", "_depthwise"): Measured(0.5023, 9, 6.13, 0.4919),
    ("decode", "_rms_norm"): Measured(0.3685, 21, 0, 1.1057),
    ("decode", "_context"): Measured(0.3021, 9, 10.47, 0.3481),
    ("decode", "_apply"): Measured(0.2385, 9, 7.85, 0.3481),
    ("decode", "_pixels"): Measured(0.0271, 1, 0, 0.06),
    ("decode", "zero_border"): Measured(0.0075, 3, 0, 0.0032),
}
# No card has run it in fp8: it is taken to gain what `_convolution` gained, whose loop and epilogue are alike.
_ASSUMED: Mapping[tuple[str, str], Measured] = {
    ("denoise", "_silu_product, fp8"): Measured(0.5611, 28, 380.51, 0.5495),
}
_VECTOR = ("_depthwise", "_gated_depthwise")
_UNMEASURED = 0.6  # of the peak: what large products and plain streams reach at least


def row_of(call: Call) -> str:
    """Returns the call's row in tables: PyTorch's products are one row, its other launches another."""
    name = call.name if not call.name.startswith("aten.") else "torch" if call.kind == "other" else "product"
    return f"{name}, fp8" if call.kind == "product" and call.dtype.itemsize == 1 else name


def share(stage: str, call: Call) -> float:
    """Returns the share of the H100's peak that this kernel reached in this stage."""
    key = (stage, row_of(call))
    found = _MEASURED.get(key, _ASSUMED.get(key))
    if found is None:
        return _UNMEASURED
    kind: Kind = "depthwise" if row_of(call) in _VECTOR else "product"
    dtype = torch.float8_e4m3fn if row_of(call).endswith("fp8") else torch.bfloat16
    work = Call("", kind, dtype, round(found.gflop * GIGA), round(found.gigabytes * GIGA), 0)
    floor = floor_ms(work, H100)
    return floor / (found.ms - found.launches * FIXED_MS)


def floor_ms(call: Call, card: Device) -> float:
    """Returns the milliseconds of `call` at the card's peaks."""
    return 1000 * card.seconds(call)


def launch_ms(stage: str, launch: Launch, card: Device) -> float:
    return launch.kernels * FIXED_MS + floor_ms(launch.call, card) / share(stage, launch.call)


def transfer_ms(transfer: Transfer) -> float:
    return COPY_MS + 1000 * transfer.bytes / (PINNED if transfer.pinned else PAGEABLE)
