"""Weights of 8 bits in another type: the interpreted kernel gives exactly what its reference gives."""

import pytest
import torch

from engines.kernels.e4m3 import FP8, power_of_two_scales
from engines.kernels.op import Launcher
from engines.kernels.text.widened_weight import WIDENED_WEIGHT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (33, 257), (64, 256)], ids=str)
def test_equals_its_reference_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(shape[1])) * torch.arange(1, shape[0] + 1)[:, None]
    )
    scale = power_of_two_scales(weight)
    narrow = (weight / scale[:, None]).to(FP8)
    actual = WIDENED_WEIGHT.run(Launcher(tma=False, processors=3), narrow, scale, dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, WIDENED_WEIGHT.reference(narrow, scale, dtype))
    assert torch.equal(actual.float(), narrow.float() * scale[:, None]), "exact in bf16 too"
