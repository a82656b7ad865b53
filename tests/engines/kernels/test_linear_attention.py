"""Linear attention of transformer and decoder: interpreted kernels equal their references."""

import pytest
import torch

from engines.kernels.linear_attention import LINEAR_ATTENTION, MULTISCALE_ATTENTION
from engines.kernels.op import Launcher, sqnr_db
from engines.models.dcae import MultiscaleLinearAttention, attend

LAUNCHER = Launcher(tma=False, processors=3)
FLOORS = {torch.float32: 100.0, torch.bfloat16: 40.0}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(1, 140, 2, 32), (3, 35, 3, 8)])
def test_transformers_form_equals_its_reference(
    batch: int, tokens: int, heads: int, head_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    dim = heads * head_dim
    qkv = draw(batch * tokens, 3 * dim).to(dtype)
    args = (qkv, draw(dim, seed=1).to(dtype) if normed else None, batch, head_dim, 1e-5)
    expected, actual = LINEAR_ATTENTION.reference(*args), LINEAR_ATTENTION.run(LAUNCHER, *args)
    assert actual.dtype == dtype
    assert sqnr_db(expected, actual) > FLOORS[dtype]


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(("batch", "tokens", "groups", "head_dim"), [(1, 140, 2, 32), (3, 35, 1, 16), (2, 9, 2, 32)])
def test_decoders_form_equals_its_reference(
    batch: int, tokens: int, groups: int, head_dim: int, dtype: torch.dtype
) -> None:
    pair = [draw(batch * tokens, 3 * groups * head_dim, seed=seed).to(dtype) for seed in range(2)]
    mix = (draw(3 * groups, head_dim, head_dim, seed=2) * head_dim**-0.5).to(dtype)
    expected = MULTISCALE_ATTENTION.reference(*pair, mix, batch, head_dim)
    actual = MULTISCALE_ATTENTION.run(LAUNCHER, *pair, mix, batch, head_dim)
    assert actual.shape == (batch * tokens, 2 * groups * head_dim)
    assert sqnr_db(expected, actual) > FLOORS[dtype] - 6  # it rounds once more, and the interpreter truncates


@pytest.mark.parametrize(("height", "width"), [(5, 7), (2, 3)])  # more and fewer tokens than head_dim
def test_decoders_reference_is_the_modules(height: int, width: int) -> None:
    module = MultiscaleLinearAttention(32, 16, (5,))
    qkv, deep = draw(2, 96, height, width), draw(2, 96, height, width, seed=1)
    mixing = module.to_qkv_multiscale[0].proj_out
    with torch.no_grad():
        expected = attend(torch.cat([qkv, mixing(deep)], 1), module.head_dim)
        flat = [part.permute(0, 2, 3, 1).reshape(-1, 96) for part in (qkv, deep)]
        actual = MULTISCALE_ATTENTION.reference(*flat, mixing.weight.view(6, 16, 16), 2, 16)
    assert sqnr_db(expected.permute(0, 2, 3, 1).reshape(-1, 64), actual) > 100


def test_a_query_without_positive_value_gives_zero() -> None:
    qkv = draw(40, 96)
    qkv[3, :32] = -1
    actual = LINEAR_ATTENTION.run(LAUNCHER, qkv, None, 1, 32, 1e-5)
    assert not actual[3].any()
    assert actual.isfinite().all()


def test_an_image_does_not_depend_on_its_batch() -> None:
    qkv = draw(3 * 140, 96).bfloat16()
    together = LINEAR_ATTENTION.run(LAUNCHER, qkv, None, 3, 32, 1e-5)
    alone = LINEAR_ATTENTION.run(LAUNCHER, qkv[140:280].contiguous(), None, 1, 32, 1e-5)
    assert torch.equal(together[140:280], alone)
