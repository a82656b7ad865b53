"""Writes zeros to the border of images as matrices (see padded.py), in place: y [grid.padded, C] -> y."""

import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.autoencoder.padded import Grid, image_of, pad
from engines.kernels.op import Launcher, Op


@triton.jit
def zero_border(y, y8, H, W, D: tl.constexpr, BC: tl.constexpr, SECOND: tl.constexpr):
    """Zeros one border pixel per program, for images of H x W pixels."""
    number = tl.program_id(0)
    image = tl.program_id(1)
    if number < 2 * (W + 2):
        line = (number // (W + 2)) * (H + 1)
        column = number % (W + 2)
    else:
        line = (number - 2 * (W + 2)) // 2 + 1
        column = (number % 2) * (W + 1)
    cols = tl.arange(0, BC)
    at = ((image.to(tl.int64) * (H + 2) + line) * (W + 2) + column) * D + cols
    zero = tl.zeros((BC,), tl.float32)
    tl.store(y + at, zero.to(y.dtype.element_ty), mask=cols < D)
    if SECOND:
        tl.store(y8 + at, zero.to(y8.dtype.element_ty), mask=cols < D)


def write_border(launch: Launcher, y: Tensor, second: Tensor | None, grid: Grid) -> None:
    """Zeros the border of `y` and of `second`, the same image in e4m3, if any."""
    around = 2 * (grid.width + 2) + 2 * grid.height
    channels = y.shape[1]
    launch(
        zero_border, (around, grid.batch), y, y if second is None else second, grid.height, grid.width, D=channels,
        BC=triton.next_power_of_2(channels), SECOND=second is not None, num_warps=1,
    )  # fmt: skip


def run(launch: Launcher, y: Tensor, grid: Grid) -> Tensor:
    write_border(launch, y, None, grid)
    return y


def reference(y: Tensor, grid: Grid) -> Tensor:
    return y.copy_(pad(image_of(y, grid)))


ZERO_BORDER = Op("zero_border", run, reference)
