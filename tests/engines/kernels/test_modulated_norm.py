"""Residual, LayerNorm and modulation: interpreted kernels equal their references."""

import pytest
import torch

from engines.kernels.e4m3 import FP8
from engines.kernels.modulated_norm import MODULATED_NORM, RESIDUAL, RESIDUAL_FP8, RESIDUAL_NORM
from engines.kernels.op import Launcher, sqnr_db

LAUNCHER = Launcher(tma=False, processors=3)
FLOORS = {torch.float32: 100.0, torch.bfloat16: 40.0}
FP8_FLOOR = 15  # the interpreter loses a carry where it rounds to e4m3: 127 becomes 64


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 5, 160), (3, 7, 48), (2, 3, 64)])
def test_equal_their_references(batch: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    x, y, extra = (torch.randn(batch * tokens, dim, generator=generator).add(1).to(dtype) for _ in range(3))
    modulation = torch.randn(batch, 4, 6, dim, generator=generator).to(dtype)
    shift, scale, gate = modulation[:, 2, :3].unbind(1)  # rows of a larger tensor
    calls = [(MODULATED_NORM, (x, scale, shift, batch, 1e-6))]
    for given_gate, given_extra in ((gate, extra), (gate, None), (None, None)):
        calls.append((RESIDUAL_NORM, (x, y, given_gate, given_extra, scale, shift, batch, 1e-6)))
        calls.append((RESIDUAL, (x, y, given_gate, given_extra, batch)))
        calls.append((RESIDUAL_NORM, (x, y, given_gate, given_extra, scale, shift, batch, 1e-6, 0.02)))
        calls.append((RESIDUAL_FP8, (x, y, given_gate, given_extra, batch, 0.03)))
    calls.append((MODULATED_NORM, (x, scale, shift, batch, 1e-6, 0.001)))  # clamped
    before = x.clone()
    for op, args in calls:
        expected, actual = op.reference(*args), op.run(LAUNCHER, *args)
        for want, got in zip(*(out if isinstance(out, tuple) else (out,) for out in (expected, actual)), strict=True):
            assert got.dtype == want.dtype
            assert got.dtype in (dtype, FP8)
            assert sqnr_db(want, got) > (FP8_FLOOR if got.dtype == FP8 else FLOORS[dtype])
    assert torch.equal(x, before)


def test_rows_of_different_modulations_are_refused() -> None:
    x, scale, shift = torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(2, 2, 16)[:, 0]
    with pytest.raises(ValueError, match="scale and shift"):
        MODULATED_NORM.run(LAUNCHER, x, scale, shift, 2, 1e-6)
