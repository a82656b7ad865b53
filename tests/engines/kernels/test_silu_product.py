"""Product with bias and SiLU: the interpreted kernel equals its reference, by pointers and by descriptors."""

import pytest
import torch

from engines.kernels.e4m3 import quantised
from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.silu_product import SILU_PRODUCT, tile_for

FLOORS = {torch.float32: 100.0, torch.bfloat16: 40.0}


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(200, 72, 264), (33, 160, 48), (5, 30, 20)])
def test_equals_its_reference(rows: int, depth: int, cols: int, tma: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(cols, depth, generator=generator)
    args = (x.to(dtype), weight.to(dtype) / depth**0.5, torch.randn(cols, generator=generator).to(dtype))
    expected, actual = SILU_PRODUCT.reference(*args), SILU_PRODUCT.run(Launcher(tma, 1), *args)
    assert actual.dtype == dtype
    assert sqnr_db(expected, actual) > FLOORS[dtype]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(200, 80, 264), (33, 304, 48), (5, 30, 20)])
def test_8_bits_equal_their_reference(rows: int, depth: int, cols: int, tma: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(cols, depth, generator=generator)
    scales = torch.tensor(0.03), torch.tensor(0.01)
    bias = torch.randn(cols, generator=generator).bfloat16()
    narrow = (quantised(x, 0.03), quantised(weight / depth**0.5, 0.01), bias, *scales)
    expected, actual = SILU_PRODUCT.reference(*narrow), SILU_PRODUCT.run(Launcher(tma, 1), *narrow)
    assert actual.dtype == torch.bfloat16
    assert sqnr_db(expected, actual) > 40
    wide = SILU_PRODUCT.reference(x, weight / depth**0.5, bias)
    assert 25 < sqnr_db(wide, actual) < 40  # e4m3 rounds each operand by 2.6 %


def test_8_bits_take_steps_of_as_many_bytes() -> None:
    for tma in (False, True):
        assert tile_for(1024, 5760, 132, tma, 1).depth == 2 * tile_for(1024, 5760, 132, tma).depth


def test_small_images_get_tiles_that_fill_the_card() -> None:
    assert tile_for(1024, 5760, 132, tma=True).cols == 128
    assert tile_for(16384, 4096, 132, tma=True).cols == 256
