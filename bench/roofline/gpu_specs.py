"""Peak rates of GPUs from their data sheets: dense operations a second by type, bytes of memory a second."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.roofline.op_counter import Call

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Device:
    """`matrix`: tensor cores, dense, accumulating in fp32; `vector`: fp32 outside of them. Per second."""

    name: str
    matrix: Mapping[str, float]
    vector: float
    bandwidth: float
    source: str

    def peak(self, dtype: torch.dtype, *, eight_bit: bool) -> float:
        """Returns the peak of matrix products with inputs of `dtype`, or of 8 bits where allowed."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.matrix["fp8" if eight_bit else "16bit"]
        return self.matrix["fp8"] if dtype.itemsize == 1 else self.vector  # fp32 stays exact: no TF32

    def seconds(self, call: Call, *, arithmetic: float = 1.0, memory: float = 1.0, eight_bit: bool = False) -> float:
        """Returns the time of one call: the slower of arithmetic and traffic at these shares of the peaks.

        eight_bit: dense 16-bit products read 8 bits and multiply at that rate, but still write 16.
        """
        narrow = eight_bit and call.kind == "product" and call.dtype.itemsize == 2 and "bmm" not in call.name
        peak = self.peak(call.dtype, eight_bit=narrow) if call.kind == "product" else self.vector
        traffic = call.read / (2 if narrow else 1) + call.written
        return max(call.operations / (peak * arithmetic), traffic / (self.bandwidth * memory))


H100 = Device(
    "H100 SXM",
    {"16bit": 989.4 * TERA, "fp8": 1978.9 * TERA},
    vector=66.9 * TERA,
    bandwidth=3350 * GIGA,
    source="NVIDIA H100 Tensor Core GPU Architecture (whitepaper), table 2, without sparsity",
)
H200 = Device(
    "H200",
    H100.matrix,
    vector=66.9 * TERA,
    bandwidth=4800 * GIGA,
    source="NVIDIA H200 data sheet: the H100's processors, without sparsity",
)
RTX4090 = Device(
    "RTX 4090",
    {"16bit": 165.2 * TERA, "fp8": 330.3 * TERA},
    vector=82.6 * TERA,
    bandwidth=1008 * GIGA,
    source="NVIDIA Ada GPU Architecture (whitepaper V2.01), appendix A, fp32 accumulation, without sparsity",
)
A100 = Device(
    "A100 SXM 80GB",
    {"16bit": 312 * TERA},
    vector=19.5 * TERA,
    bandwidth=2039 * GIGA,
    source="NVIDIA A100 80GB data sheet, without sparsity; it has no fp8",
)
DEVICES = (H100, H200, RTX4090, A100)
