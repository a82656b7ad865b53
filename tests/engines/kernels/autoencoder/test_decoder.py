"""The decoder's interpreted kernels equal their references: borders, odd sizes, batches, 8 bits."""

import pytest
import torch
from torch import Tensor

from engines.kernels.autoencoder.convolution import (
    CONVOLUTION,
    CONVOLUTION_NORM,
    CONVOLUTION_SILU,
    CONVOLUTION_TAPS,
    tap_weight,
)
from engines.kernels.autoencoder.depthwise import DEPTHWISE
from engines.kernels.autoencoder.padded import Grid, image_of, pad
from engines.kernels.autoencoder.pixels import PIXELS
from engines.kernels.autoencoder.rms_norm import RMS_NORM, Layout
from engines.kernels.autoencoder.upsampling import UPSAMPLING
from engines.kernels.e4m3 import FP8
from engines.kernels.op import Launcher, Op, sqnr_db

GRIDS = (Grid(1, 5, 7), Grid(2, 4, 3))
DTYPES = {torch.float32: 90.0, torch.bfloat16: 40.0, FP8: 20.0}  # the interpreter truncates where a card rounds


class RandomTensors:
    """Returns seeded random tensors in sequence."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * scale


def agree(op: Op, tma: bool, dtype: torch.dtype, *args: object) -> None:
    expected, actual = op.reference(*args), op.run(Launcher(tma, 3), *args)
    pairs = zip(
        *((outputs if isinstance(outputs, tuple) else (outputs,)) for outputs in (expected, actual)), strict=True
    )
    for want, got in pairs:
        assert want.dtype == got.dtype
        assert want.shape == got.shape
        assert sqnr_db(want, got) > DTYPES[want.dtype if want.dtype == FP8 else dtype]


def operands(dtype: torch.dtype, grid: Grid, channels: int, columns: int, random: RandomTensors) -> tuple[object, ...]:
    """Returns x, weight and scale of a convolution."""
    x = pad(random(grid.batch, channels, grid.height, grid.width)).to(dtype)
    weight = random(columns, 9 * channels, scale=(9 * channels) ** -0.5)
    if dtype != FP8:
        return x, weight.to(dtype), None
    scale = weight.abs().amax(1) / 448
    return x, (weight / scale[:, None]).to(FP8), scale


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_convolutions(grid: Grid, dtype: torch.dtype, tma: bool) -> None:
    random, channels = RandomTensors(), 32
    x, weight, scale = operands(dtype, grid, channels, channels, random)
    wide = torch.bfloat16 if dtype == FP8 else dtype
    gain, bias, gain2, bias2 = (random(channels) for _ in range(4))
    residual = pad(random(grid.batch, channels, grid.height, grid.width)).to(wide)
    second = 0.02 if dtype == FP8 else None
    out = tap_weight(random(3, channels, 3, 3, scale=0.1)).to(wide)
    agree(CONVOLUTION, tma, wide, x, weight, scale, grid)
    agree(CONVOLUTION_SILU, tma, wide, x, weight, scale, bias, 0.01, grid)
    agree(CONVOLUTION_NORM, tma, wide, x, weight, scale, gain, bias, residual, 1e-5, second, grid)
    agree(CONVOLUTION_TAPS, tma, wide, x, weight, scale, gain, bias, residual, gain2, bias2, out, 1e-5, grid)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("bordered", [False, True], ids=["plain", "bordered"])
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("grid", [*GRIDS, Grid(2, 2, 64)], ids=str)  # the last fills tiles, so descriptors write them
def test_upsampling(grid: Grid, side: int, bordered: bool, tma: bool) -> None:
    random, channels, columns = RandomTensors(), 32, 32
    x = pad(random(grid.batch, channels, grid.height, grid.width))
    weight, bias = random(4 * columns, side * side * channels, scale=0.1), random(columns)
    agree(UPSAMPLING, tma, torch.float32, x, weight, bias, bordered, None, grid)
    if bordered:
        agree(UPSAMPLING, tma, torch.bfloat16, x.bfloat16(), weight.bfloat16(), bias, bordered, 0.01, grid)


@pytest.mark.parametrize("second", [None, 0.02])
@pytest.mark.parametrize("layout", ["plain", "bordered", "to bordered"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_norm(grid: Grid, layout: Layout, second: float | None) -> None:
    random, channels = RandomTensors(), 48
    images = [random(grid.batch, channels, grid.height, grid.width) for _ in range(2)]
    y, residual = (
        pad(i) if layout == "bordered" else i.permute(0, 2, 3, 1).reshape(-1, channels).contiguous() for i in images
    )
    for dtype in (torch.float32, torch.bfloat16):
        args = (y.to(dtype), random(channels), random(channels), residual.to(dtype), 1e-5, layout, second, grid)
        agree(RMS_NORM, False, dtype, *args)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(2, 11, 9)], ids=str)
def test_depthwise(grid: Grid) -> None:
    random, channels = RandomTensors(), 80
    x, taps = random(grid.pixels, channels), random(25, channels, scale=0.2)
    for dtype in (torch.float32, torch.bfloat16):
        agree(DEPTHWISE, False, dtype, x.to(dtype), taps.to(dtype), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pixels_are_the_convolution_of_the_taps(grid: Grid) -> None:
    random = RandomTensors()
    image, weight, bias = random(grid.batch, 16, grid.height, grid.width), random(3, 16, 3, 3, scale=0.05), random(3)
    taps = (pad(image) @ tap_weight(weight))[:, :27].t().contiguous()
    expected = torch.nn.functional.conv2d(image, weight, bias, padding=1)
    level = ((expected / 2 + 0.5).clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 1)
    for pixels, broken in (PIXELS.reference(taps, bias, grid), PIXELS.run(Launcher(False, 3), taps, bias, grid)):
        assert (pixels.int() - level.int()).abs().max() <= 1
        assert (pixels == level).float().mean() > 0.98
        assert broken.tolist() == [0] * grid.batch


def test_pixels_tell_what_is_not_finite() -> None:
    grid = Grid(3, 4, 5)
    taps = torch.zeros(27, grid.padded, dtype=torch.float16)
    for image, value in ((0, float("nan")), (2, float("inf"))):
        taps[13].view(3, 6, 7)[image, 2, 3] = value
    for _, broken in (
        PIXELS.reference(taps, torch.zeros(3), grid),
        PIXELS.run(Launcher(False, 3), taps, torch.zeros(3), grid),
    ):
        assert [bool(count) for count in broken.tolist()] == [True, False, True]


def test_a_border_is_zero_whatever_memory_held() -> None:
    grid = Grid(2, 4, 3)
    random = RandomTensors()
    x, weight, scale = operands(torch.float32, grid, 16, 16, random)
    actual = CONVOLUTION_SILU.run(Launcher(True, 3), x, weight, scale, random(16), 1.0, grid)
    image_of(actual, grid).zero_()
    assert not actual.any()
