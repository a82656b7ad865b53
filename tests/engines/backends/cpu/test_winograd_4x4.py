"""The C kernels equal PyTorch's modules, with every set of instructions that this CPU has."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu import convolution
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.winograd_4x4 import TiledConv
from engines.backends.cpu.tiled_steps import TiledSteps
from engines.backends.parity import difference
from engines.models.dcae import ResBlock, Upsample


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) / 8)
    return module


def image(channels: int, height: int, width: int, dtype: torch.dtype = torch.float32, count: int = 1) -> Tensor:
    values = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def convolved(library: Library, conv: nn.Conv2d, x: Tensor, *, silu: bool = False) -> Tensor:
    size = (1, conv.out_channels, *x.shape[2:])
    out = torch.full(size, float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    TiledConv(library, conv.weight, conv.bias, silu=silu)(x, out)
    return out


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (4, 4), (5, 3), (17, 30)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_the_convolution_at_any_size(
    library: Library, size: tuple[int, int], bias: bool, silu: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    conv = seeded(lambda: nn.Conv2d(64, 128, 3, padding=1, bias=bias))
    assert isinstance(conv, nn.Conv2d)
    x = image(64, *size)
    expected = F.silu(conv(x)) if silu else conv(x)
    torch.testing.assert_close(convolved(library, conv, x, silu=silu), expected, rtol=0, atol=1e-4)


def test_in_bf16_a_convolution_keeps_38_db_and_without_bf16_products_more(library: Library) -> None:
    conv = seeded(lambda: nn.Conv2d(64, 64, 3, padding=1)).bfloat16()
    assert isinstance(conv, nn.Conv2d)
    x = image(64, 19, 23, torch.bfloat16)
    exact = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), padding=1)
    bound = 38 if library.bf16_products else 53
    assert difference(exact, convolved(library, conv, x)).sqnr_db > bound


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_not_finite(library: Library, value: float, dtype: torch.dtype) -> None:
    conv = seeded(lambda: nn.Conv2d(64, 64, 3, padding=1)).to(dtype)
    assert isinstance(conv, nn.Conv2d)
    x = image(64, 8, 8, dtype)
    x[0, 5, 3, 3] = value
    reached = conv(x).isfinite().logical_not()
    for silu in (False, True):
        assert not convolved(library, conv, x, silu=silu)[reached].isfinite().any()


@pytest.mark.parametrize("height", [1, 3, 4, 5, 8, 13, 32])
@pytest.mark.parametrize("strip", [1, 64 * 6 * 8, 2**23], ids=["four rows", "eight rows", "one strip"])
def test_a_res_block_equals_pytorchs_in_strips_of_any_height(
    library: Library, height: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "STRIP_NUMEL", strip)
    block = seeded(lambda: ResBlock(64))
    assert isinstance(block, ResBlock)
    x = image(64, height, 6, count=2)
    expected = block(x)
    actual = TiledSteps(library).res_block(block)(x)
    assert actual is x
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("interpolate", [True, False], ids=["interpolate", "shuffle"])
@pytest.mark.parametrize(("channels", "shortcut"), [((64, 64), True), ((128, 64), True), ((64, 128), False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upsampling_equals_pytorchs(
    library: Library, interpolate: bool, channels: tuple[int, int], shortcut: bool, dtype: torch.dtype
) -> None:
    """In bf16 the shortcut is exact: 53 dB of the result, of which it is the larger part."""
    upsample = seeded(lambda: Upsample(*channels, interpolate, shortcut)).to(dtype)
    assert isinstance(upsample, Upsample)
    upsample.conv.weight /= 16
    x = image(channels[0], 5, 7, dtype, count=2)
    steps = TiledSteps(library)
    assert steps.computes(upsample)
    actual = steps.upsample(upsample)(x)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    expected = upsample.double()(x.double())
    assert difference(expected, actual).sqnr_db > (90 if dtype == torch.float32 else 45 if shortcut else 38)


def test_offers_only_what_it_computes(library: Library) -> None:
    steps = TiledSteps(library)
    assert steps.computes(ResBlock(64))
    assert steps.computes(Upsample(64, 64, True))
    for block in (ResBlock(68), Upsample(68, 68, True), Upsample(64, 68, True)):
        assert not steps.computes(block)
    with torch.device("meta"):
        assert not steps.computes(Upsample(1024, 1024, True))
    assert not steps.computes(Upsample(256, 64, True))  # a shortcut of every fourth channel
