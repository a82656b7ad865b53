"""Seeded random weights."""

import torch
from random_modules import RECIPE

from engines.checkpoints.random_weights import RandomWeights
from engines.models.transformer import SprintTransformer


def drawn(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = SprintTransformer(RECIPE.teacher.architecture)
    RandomWeights(seed).load_into("transformer", module, dtype, torch.device("cpu"))
    return module.state_dict()


def test_a_seed_is_the_same_weights_in_any_precision() -> None:
    exact, rounded = drawn(0, torch.float32), drawn(0, torch.bfloat16)
    assert exact.keys() == rounded.keys()
    for key, value in rounded.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[key].bfloat16()), key


def test_another_seed_is_other_weights() -> None:
    one, other = drawn(0, torch.float32), drawn(1, torch.float32)
    assert not any(torch.equal(one[key], other[key]) for key in one)
