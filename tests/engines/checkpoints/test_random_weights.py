"""Seeded random weights."""

import pytest
import torch
from random_modules import RECIPE

from engines.checkpoints import random_weights
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


def test_each_chunk_has_its_own_seed_so_that_one_large_key_is_no_core_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(0, torch.float32)
    monkeypatch.setattr(random_weights, "_CHUNK", 1024)
    parts = drawn(0, torch.float32)
    large = [key for key, value in whole.items() if value.numel() >= 2048]
    assert large
    for key in large:
        first, second = whole[key].view(-1)[:2048].split(1024)
        assert torch.equal(parts[key].view(-1)[:1024], first)
        assert not torch.equal(parts[key].view(-1)[1024:2048], second)


def test_another_seed_is_other_weights() -> None:
    one, other = drawn(0, torch.float32), drawn(1, torch.float32)
    assert not any(torch.equal(one[key], other[key]) for key in one)
