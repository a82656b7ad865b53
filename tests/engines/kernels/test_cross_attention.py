"""Attention over text: interpreted kernels equal their references, and these equal torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from engines.kernels.cross_attention import CROSS_ATTENTION, KEY_NORM
from engines.kernels.e4m3 import FP8
from engines.kernels.op import Launcher, sqnr_db

LAUNCHER = Launcher(tma=False, processors=3)
FLOORS = {torch.float32: 100.0, torch.bfloat16: 40.0}
BLOCKS = 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("lengths", "tokens", "text", "heads", "head_dim"),
    [((40,), 70, 40, 1, 72), ((1, 33, 20), 9, 35, 2, 8)],
)
def test_equal_their_references(
    lengths: tuple[int, ...], tokens: int, text: int, heads: int, head_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    batch, dim = len(lengths), heads * head_dim
    kv, weight = draw(batch * text, BLOCKS * 2 * dim).to(dtype), draw(BLOCKS, dim, seed=1)
    expected = KEY_NORM.reference(kv.clone(), weight, normed, 1e-5)
    actual = KEY_NORM.run(LAUNCHER, kv.clone(), weight, normed, 1e-5)
    assert sqnr_db(expected, actual) > FLOORS[dtype]
    query = draw(batch * tokens, dim, seed=2).to(dtype) / head_dim**0.5
    args = (query, expected, torch.tensor(lengths, dtype=torch.int32), 1, heads, normed, 1e-5)
    expected, actual = CROSS_ATTENTION.reference(*args), CROSS_ATTENTION.run(LAUNCHER, *args)
    assert actual.dtype == dtype
    assert sqnr_db(expected, actual) > FLOORS[dtype]
    narrow = CROSS_ATTENTION.run(LAUNCHER, *args, 0.01)
    assert narrow.dtype == FP8
    assert (
        sqnr_db(CROSS_ATTENTION.reference(*args, 0.01), narrow) > 15
    )  # the interpreter loses a carry where it rounds to e4m3


def test_references_are_torchs_attention() -> None:
    heads, head_dim, text = 2, 8, 6
    kv, query = draw(2 * text, BLOCKS * 32), draw(2 * 5, 16, seed=1)
    keys, values = kv.view(2, text, BLOCKS, 2, heads, head_dim)[:, :, 1].permute(2, 0, 3, 1, 4)
    mask = torch.arange(text)[None] < torch.tensor([[4], [6]])
    queries = query.view(2, 5, heads, head_dim).transpose(1, 2)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
    scaled = KEY_NORM.reference(kv.clone(), torch.full((BLOCKS, 16), head_dim**-0.5), False, 1e-5)
    lengths = torch.tensor([4, 6], dtype=torch.int32)
    actual = CROSS_ATTENTION.reference(query, scaled, lengths, 1, heads, False, 1e-5)
    assert sqnr_db(expected.transpose(1, 2).reshape(10, 16), actual) > 100
