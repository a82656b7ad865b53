"""Winograd's minimal filtering along the rows equals the convolution."""

import pytest
import torch
from torch import nn

from engines.backends.cpu.winograd import WinogradConv
from engines.backends.parity import difference

needs_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no packed convolutions in bf16 (AVX512 or AVX-NE-CONVERT)",
)


def seeded_conv(bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(24, 40, 3, padding=1, bias=bias).requires_grad_(False)


def images(height: int, count: int = 1) -> torch.Tensor:
    values = torch.randn(count, 24, height, 10, generator=torch.Generator().manual_seed(1))
    return values.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6, 7, 8, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_convolution_at_any_height(height: int, bias: bool, silu: bool) -> None:
    conv, x = seeded_conv(bias), images(height, count=2)
    exact = nn.functional.silu(conv(x)) if silu else conv(x)
    actual = WinogradConv(conv, silu=silu)(x)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edges", [(0, 0), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("height", [6, 7, 9])
def test_a_strip_with_its_neighbours_gives_its_own_rows(edges: tuple[int, int], height: int) -> None:
    conv, x = seeded_conv(), images(height)
    padded = nn.functional.pad(x, (1, 1, *edges))
    torch.testing.assert_close(
        WinogradConv(conv)(x, edges), nn.functional.conv2d(padded, conv.weight, conv.bias), rtol=0, atol=1e-5
    )


@needs_bf16
def test_in_bf16_a_convolution_keeps_38_db() -> None:
    """Plain bf16 keeps 52 dB; the loss is small beside the rounding of the images it adds to (test_decoder.py)."""
    conv, x = seeded_conv().bfloat16(), images(16).bfloat16()
    assert conv.bias is not None
    exact = nn.functional.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)
    assert difference(exact, WinogradConv(conv)(x)).sqnr_db > 38


def test_what_is_not_finite_stays_not_finite() -> None:
    x = images(8)
    x[0, 5, 3, 3] = float("inf")
    reached = seeded_conv()(x).isfinite().logical_not()
    assert not WinogradConv(seeded_conv())(x)[reached].isfinite().any()
