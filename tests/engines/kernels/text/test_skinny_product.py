"""Products of few rows: interpreted kernels equal their references."""

import pytest
import torch

from engines.kernels.e4m3 import FP8, power_of_two_scales
from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.text.skinny_product import GATED_PRODUCT, SKINNY_PRODUCT, parts_of

LAUNCHER = Launcher(tma=False, processors=3)
BOUNDS = {torch.float32: 100, torch.bfloat16: 40}


def operands(rows: int, width: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(count, inner, generator=generator) for count in (rows, width))
    return x.to(dtype), (w / inner**0.5).to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "width", "inner", "parts"), [(1, 48, 96, 1), (24, 80, 640, 5), (64, 64, 300, 3)])
def test_parts_equal_their_reference(rows: int, width: int, inner: int, parts: int, dtype: torch.dtype) -> None:
    x, w = operands(rows, width, inner, dtype)
    actual = SKINNY_PRODUCT.run(LAUNCHER, x, w)
    assert actual.shape == (parts, rows, width)
    assert sqnr_db(SKINNY_PRODUCT.reference(x, w), actual) > 100
    assert sqnr_db(x.float() @ w.float().T, actual.sum(0)) > 100


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 32, 128), (20, 48, 100)])
def test_gated_equals_its_reference(rows: int, width: int, inner: int, dtype: torch.dtype) -> None:
    x, w = operands(rows, 2 * width, inner, dtype)
    actual = GATED_PRODUCT.run(LAUNCHER, x, w, w)
    assert actual.dtype == dtype
    assert sqnr_db(GATED_PRODUCT.reference(x, w, w), actual) > BOUNDS[dtype]


@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 48, 96), (24, 80, 640), (64, 64, 300)])
def test_weights_of_8_bits_equal_their_references(rows: int, width: int, inner: int) -> None:
    x, w = operands(rows, 2 * width, inner, torch.float32)
    scale = power_of_two_scales(w)
    narrow = (w / scale[:, None]).to(FP8)
    exact = narrow.float() * scale[:, None]
    assert 25 < sqnr_db(w, exact) < 40
    for dtype in (torch.float32, torch.bfloat16):
        typed = x.to(dtype)
        parts = SKINNY_PRODUCT.run(LAUNCHER, typed, narrow, scale)
        assert sqnr_db(SKINNY_PRODUCT.reference(typed, narrow, scale), parts) > 100
        assert sqnr_db(typed.float() @ exact.T, parts.sum(0)) > 100  # x keeps its own precision
        gated = GATED_PRODUCT.run(LAUNCHER, typed, narrow, narrow, scale)
        assert gated.dtype == dtype
        assert sqnr_db(GATED_PRODUCT.reference(typed, exact.to(dtype), w), gated) > BOUNDS[dtype]


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    x, w = operands(20, 80, 640, torch.float32)
    assert torch.equal(SKINNY_PRODUCT.run(LAUNCHER, x, w)[:, :17], SKINNY_PRODUCT.run(LAUNCHER, x[:17], w))


def test_parts_of_gemmas_products() -> None:
    """Products to width 2304 get 288 programs, two or three per each of 132 processors."""
    assert parts_of(2304, 2048) == parts_of(2304, 9216) == 8
    assert parts_of(16384, 4096) == 2
