"""Linear maps of a few rows equal PyTorch's, and a row does not depend on the others."""

import pytest
import torch
from torch import nn

from engines.backends.cpu.kernels.few_rows import FewRowsLinear, computes, replace_linears
from engines.backends.cpu.kernels.library import Library


def linear(
    size_in: int = 96, size_out: int = 76, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size_in, size_out, bias=bias, dtype=dtype).requires_grad_(False)


def test_takes_the_place_of_a_linear_that_it_computes(library: Library) -> None:
    fits = library.bf16_products
    module = nn.ModuleDict({"fits": linear(), "bias": linear(bias=True), "fp32": linear(dtype=torch.float32)})
    module["narrow"], module["odd"] = linear(80, 64), linear(64, 65)
    assert [name for name, part in module.items() if computes(part, library)] == (["fits"] if fits else [])
    weight = module.get_parameter("fits.weight")
    assert replace_linears(module, library) == int(fits)
    assert module.get_parameter("fits.weight") is weight
    assert isinstance(module["fits"], FewRowsLinear) == fits


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 20, 23])
@pytest.mark.parametrize("size", [(32, 4), (96, 76), (2304, 256)], ids=str)
def test_equals_the_linear(bf16_library: Library, rows: int, size: tuple[int, int]) -> None:
    exact = linear(*size).float()
    x = torch.randn(rows, size[0], generator=torch.Generator().manual_seed(1)).bfloat16()
    actual = FewRowsLinear(linear(*size), bf16_library)(x)
    torch.testing.assert_close(actual, exact(x.float()).bfloat16(), rtol=2**-7, atol=1e-3)
    alone = [FewRowsLinear(linear(*size), bf16_library)(row[None]) for row in x]
    assert torch.equal(torch.cat(alone), actual)


def test_takes_batches_and_views(bf16_library: Library) -> None:
    module, x = FewRowsLinear(linear(), bf16_library), torch.randn(2, 192, 3).bfloat16()
    view = x.transpose(1, 2)[..., ::2]
    assert module(view).shape == (2, 3, 76)
    assert torch.equal(module(view), module(view.contiguous()))


def test_no_rows_give_no_rows(bf16_library: Library) -> None:
    assert FewRowsLinear(linear(), bf16_library)(torch.empty(1, 0, 96, dtype=torch.bfloat16)).shape == (1, 0, 76)
