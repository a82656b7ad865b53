"""cuBLAS's product of e4m3 operands, as PyTorch computes it on a CPU, equals its reference."""

import pytest
import torch

from engines.kernels.e4m3 import FP8, input_scale, power_of_two_scales, quantised
from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.scaled_product import MULTIPLE, SCALED_PRODUCT

LAUNCHER = Launcher(tma=False, processors=3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "depth", "cols"), [(5, 32, 48), (33, 160, 16), (1, 16, 304)])
def test_equals_its_reference(rows: int, depth: int, cols: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(cols, depth, generator=generator)
    bias = torch.randn(cols, generator=generator).bfloat16() if biased else None
    args = (quantised(x, 0.02), quantised(weight, 0.01), bias, torch.tensor(0.02), torch.tensor(0.01))
    expected, actual = SCALED_PRODUCT.reference(*args), SCALED_PRODUCT.run(LAUNCHER, *args)
    assert actual.dtype == torch.bfloat16
    assert sqnr_db(expected, actual) > 40
    exact = x @ weight.T + (0 if bias is None else bias.float())
    assert 25 < sqnr_db(exact, actual) < 40


def test_an_activation_may_double_before_it_is_clamped() -> None:
    x = torch.tensor([1.0, -3.0, 6.0, 12.0])
    wide = quantised(x, input_scale(3.0)).float() * input_scale(3.0)
    assert wide.tolist() == pytest.approx([1, -3, 6, 6], rel=0.04)


def test_powers_of_two_are_exact_in_bf16_and_fit_the_range() -> None:
    weight = torch.randn(MULTIPLE, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 16)[:, None]
    weight[3] = 0
    scale = power_of_two_scales(weight)
    narrow = (weight / scale[:, None]).to(FP8)
    assert bool(narrow.float().isfinite().all())
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((16,), 0.5))
    exact = narrow.float() * scale[:, None]
    assert torch.equal(exact.bfloat16().float(), exact)
    assert sqnr_db(weight, exact) > 29
