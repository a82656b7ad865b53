"""GELU of one half times the other: the interpreted kernel equals its reference."""

import pytest
import torch

from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.text.gelu_gate import GELU_GATE

LAUNCHER = Launcher(tma=False, processors=3)
BOUNDS = {torch.float32: 100, torch.bfloat16: 40}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 48), (2, 1100)])
def test_equals_its_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    y = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    actual = GELU_GATE.run(LAUNCHER, y)
    assert actual.dtype == dtype
    assert sqnr_db(GELU_GATE.reference(y), actual) > BOUNDS[dtype]
