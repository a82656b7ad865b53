"""Gated depthwise 3x3: the interpreted kernel equals its reference, and this equals the module."""

import pytest
import torch
import torch.nn.functional as F

from engines.kernels.e4m3 import FP8
from engines.kernels.gated_depthwise import GATED_DEPTHWISE
from engines.kernels.op import Launcher, sqnr_db
from engines.models.layers import GLUMBConv

LAUNCHER = Launcher(tma=False, processors=3)
FLOORS = {torch.float32: 100.0, torch.bfloat16: 40.0}


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(("batch", "height", "width", "channels"), [(1, 11, 10, 40), (3, 4, 3, 24), (1, 1, 1, 16)])
def test_equals_its_reference(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch * height * width, 2 * channels, generator=generator).to(dtype)
    taps, bias = torch.randn(9, 2 * channels, generator=generator), torch.randn(2 * channels, generator=generator)
    args = (x, taps.to(dtype), bias.to(dtype), batch, height, width)
    expected, actual = GATED_DEPTHWISE.reference(*args), GATED_DEPTHWISE.run(LAUNCHER, *args)
    assert actual.dtype == dtype
    assert sqnr_db(expected, actual) > FLOORS[dtype]
    narrow = GATED_DEPTHWISE.run(LAUNCHER, *args, 0.2)
    assert narrow.dtype == FP8
    assert (
        sqnr_db(GATED_DEPTHWISE.reference(*args, 0.2), narrow) > 15
    )  # the interpreter loses a carry where it rounds to e4m3


def test_reference_is_the_modules() -> None:
    torch.manual_seed(0)
    module = GLUMBConv(16, 2.5, norm=False, residual=False)
    x = torch.randn(2, 16, 5, 3)
    with torch.no_grad():
        expanded = F.silu(module.conv_inverted(x)).permute(0, 2, 3, 1).reshape(30, -1)
        taps = module.conv_depth.weight.reshape(-1, 9).t().contiguous()
        gated = GATED_DEPTHWISE.reference(expanded, taps, module.conv_depth.bias, 2, 5, 3)
        actual = F.linear(gated, module.conv_point.weight.flatten(1)).reshape(2, 5, 3, 16).permute(0, 3, 1, 2)
        assert sqnr_db(module(x), actual) > 100
