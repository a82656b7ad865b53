"""Attention after a shared prefix: the interpreted kernel equals its reference."""

import pytest
import torch
from torch import Tensor

from engines.kernels.op import Launcher, sqnr_db
from engines.kernels.text.capped_attention import CAPPED_ATTENTION

LAUNCHER = Launcher(tma=False, processors=3)
AHEAD = torch.zeros(8)  # weights to prefetch, which only cards do
BOUNDS = {torch.float32: 100, torch.bfloat16: 40}


def operands(
    shared: list[int], length: int, prefix: int, heads: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    # In bf16 the interpreter truncates where a card rounds; large logits would only show that.
    size = 3 if dtype == torch.float32 else 1
    qkv = torch.randn(len(shared), length, (heads + 2 * keys) * dim, generator=generator) * size
    past_key, past_value = (torch.randn(keys, prefix, dim, generator=generator) for _ in range(2))
    angle = torch.rand(prefix + length, dim // 2, generator=generator) * 6
    return (
        qkv.to(dtype), past_key.to(dtype), past_value.to(dtype), torch.tensor(shared, dtype=torch.int32),
        angle.cos(), angle.sin(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("shared", "length", "prefix", "heads", "keys", "dim", "window"),
    [
        ([67], 5, 70, 4, 2, 32, 4096),
        ([9, 0, 65], 19, 66, 4, 2, 12, 4096),
        ([9, 20, 3], 37, 20, 2, 2, 12, 6),
        ([3], 40, 5, 4, 1, 136, 30),
    ],
    ids=["one prompt", "batch of three", "window", "two slices of the values"],
)
def test_equals_its_reference(
    shared: list[int], length: int, prefix: int, heads: int, keys: int, dim: int, window: int, dtype: torch.dtype
) -> None:
    args = (*operands(shared, length, prefix, heads, keys, dim, dtype), dim**-0.5, 50.0, window, AHEAD)
    actual = CAPPED_ATTENTION.run(LAUNCHER, *args)
    assert actual.dtype == dtype
    assert sqnr_db(CAPPED_ATTENTION.reference(*args), actual) > BOUNDS[dtype]


def test_equals_its_reference_in_the_tiles_of_a_larger_card() -> None:
    args = (*operands([80, 9], 19, 90, 4, 2, 12, torch.float32), 12**-0.5, 50.0, 4096, AHEAD)
    actual = CAPPED_ATTENTION.run(Launcher(tma=True, processors=3), *args)
    assert sqnr_db(CAPPED_ATTENTION.reference(*args), actual) > 100


def test_largest_logits_stay_finite() -> None:
    qkv, *rest = operands([8], 4, 8, 2, 1, 32, torch.bfloat16)
    args = (qkv * 100, *rest, 1.0, 50.0, 4096, AHEAD)
    assert sqnr_db(CAPPED_ATTENTION.reference(*args), CAPPED_ATTENTION.run(LAUNCHER, *args)) > 30


def test_what_is_behind_a_row_does_not_reach_it() -> None:
    qkv, *rest = operands([3, 8], 9, 8, 2, 1, 12, torch.float32)
    changed = qkv.clone()
    changed[0, 6:], changed[1] = 7.0, 5.0
    first, second = (CAPPED_ATTENTION.run(LAUNCHER, x, *rest, 0.3, 50.0, 4096, AHEAD) for x in (qkv, changed))
    assert torch.equal(first[0, :6], second[0, :6])
    assert not torch.equal(first[0, 6:], second[0, 6:])
