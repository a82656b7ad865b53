"""Gemma's norms, alone and between two products: interpreted kernels equal their references."""

import pytest
import torch

from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.text.gemma_norm import GEMMA_NORM, SANDWICH_NORM

LAUNCHER = Launcher(tma=False, processors=3)
BOUNDS = {torch.float32: 100, torch.bfloat16: 40}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 144)])
def test_norm_equals_its_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator).to(dtype) * 3
    pre = torch.rand(width, generator=generator) + 0.5
    assert sqnr_db(GEMMA_NORM.reference(x, pre, 1e-6), GEMMA_NORM.run(LAUNCHER, x, pre, 1e-6)) > BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("parts", "rows", "width"), [(0, 3, 144), (1, 5, 48), (3, 7, 144)])
def test_sandwich_equals_its_reference(parts: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """y is a product of x's type (parts 0), or partial sums in fp32."""
    generator = torch.Generator().manual_seed(parts)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    y = torch.randn(*([parts] if parts else []), rows, width, generator=generator).to(torch.float32 if parts else dtype)
    post, pre = (torch.rand(width, generator=generator) + 0.5 for _ in range(2))
    x_kept = x.clone()
    actual = SANDWICH_NORM.run(LAUNCHER, y, x, post, pre, 1e-3, y)
    for want, got in zip(SANDWICH_NORM.reference(y, x, post, pre, 1e-3, y), actual, strict=True):
        assert got.dtype == dtype
        assert sqnr_db(want, got) > BOUNDS[dtype]
    assert torch.equal(x, x_kept)
