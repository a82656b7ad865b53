"""Norms and attention between the products of a block, in C, equal PyTorch's operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels import cross_attention, linear_attention
from engines.backends.cpu.kernels.cross_attention import CrossAttention
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.linear_attention import LinearAttention
from engines.backends.cpu.kernels.norms import Residual
from engines.backends.cpu.steps import attend_in_slices
from engines.backends.cpu.tiled_steps import attention_factory
from engines.backends.parity import difference

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> None:
    """bf16 rounds the result once: 50 dB and more."""
    assert actual.dtype == dtype
    assert difference(expected.float(), actual.float()).sqnr_db > (50 if dtype == torch.bfloat16 else 105)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_sum_norm_and_modulation(library: Library, rows: int, dtype: torch.dtype) -> None:
    x, added = numbers(rows, 96).to(dtype), numbers(rows, 96, seed=1).to(dtype)
    gate, shift, scale = numbers(3, 96, seed=2)
    residual = Residual(library, EPS)

    def normed(total: Tensor) -> Tensor:
        return F.layer_norm(total.double(), (96,), eps=EPS) * (1 + scale) + shift

    check(normed(x), residual.normed(x, shift, scale), dtype)
    out = torch.full_like(x, float("nan"))
    residual.add(x, added, gate, out)
    check(x.double() + gate * added.double(), out, dtype)
    total = x.clone()
    check(normed(x.double() + added.double()), residual.add_normed(total, added, shift, scale), dtype)
    check(x.double() + added.double(), total, dtype)
    residual.add(x, added, gate, x)
    assert torch.equal(x, out)


def projections(rows: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns queries, keys and values [N, H, d] whose rows lie apart."""
    return numbers(rows, 3 * heads, size).to(dtype).chunk(3, dim=1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 32), (5, 3, 32), (32, 2, 16), (71, 4, 64)])
def test_linear_attention(library: Library, rows: int, heads: int, size: int, dtype: torch.dtype) -> None:
    query, key, value = projections(rows, heads, size, dtype)
    norms = numbers(2, heads * size, seed=1).unbind()
    attend = LinearAttention(library, (norms[0], norms[1]), EPS)
    expected = linear_attention.reference(*(x.double() for x in (query, key, value)), norms, EPS)
    check(expected, attend(query, key, value), dtype)
    apart = (query.contiguous(), key.contiguous(), value.contiguous())
    assert torch.equal(attend(*apart), attend(query, key, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_attention_of_a_decoder_is_that_of_pytorch(library: Library, dtype: torch.dtype) -> None:
    """A query, a key and a value of a head lie side by side; the result is a part of wider rows."""
    query, key, value = numbers(70, 4, 3, 32).to(dtype).unbind(2)
    outs = [torch.zeros(70, 3, 4, 32, dtype=dtype) for _ in range(2)]
    for attend, out in zip((attention_factory(library)(32), attend_in_slices), outs, strict=True):
        attend(query, key, value, out[:, 1])
    check(outs[1].double(), outs[0], dtype)
    assert not outs[0][:, ::2].any()
    assert attention_factory(library)(library.lanes + 1) is attend_in_slices


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "size"), [(1, 1, 1, 32), (9, 3, 2, 72), (8, 16, 4, 24), (21, 300, 2, 112)]
)
def test_cross_attention(library: Library, rows: int, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    query, norms = numbers(rows, heads * size).to(dtype), numbers(2, heads * size, seed=1).unbind()
    _, key, value = numbers(tokens, 3 * heads * size).to(dtype).chunk(3, dim=1)
    attend = CrossAttention(library, size, (norms[0], norms[1]), EPS)
    expected = cross_attention.reference(*(x.double() for x in (query, key, value)), size, norms, EPS)
    check(expected, attend(query, key, value), dtype)


def test_without_norms_queries_and_keys_stay_as_they_are(library: Library) -> None:
    heads = projections(7, 2, 32, torch.float32)
    query, key, value = (x.flatten(1).contiguous() for x in heads)
    q, k, v = (x.transpose(0, 1) for x in heads)
    softmax = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(CrossAttention(library, 32, None, 0)(query, key, value), softmax, rtol=0, atol=1e-5)
    q, k = F.relu(q), F.relu(k)
    linear = (q @ (k.mT @ v) / (q @ k.sum(1).unsqueeze(2) + 1e-15)).transpose(0, 1)
    torch.testing.assert_close(LinearAttention(library)(*heads), linear, rtol=1e-4, atol=1e-4)


def test_large_scores_do_not_overflow(library: Library) -> None:
    query, key, value = 300 * numbers(3, 32), 300 * numbers(5, 32, seed=1), numbers(5, 32, seed=2)
    actual = CrossAttention(library, 32, None, 0)(query, key, value)
    torch.testing.assert_close(actual, value[(query @ key.T).argmax(1)], rtol=0, atol=1e-5)


def test_a_query_with_nothing_positive_gives_zeros(library: Library) -> None:
    query, key, value = -numbers(3, 1, 32).abs(), numbers(3, 1, 32), numbers(3, 1, 32)
    assert torch.equal(LinearAttention(library)(query, key, value), torch.zeros(3, 1, 32))


@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_what_is_not_finite_stays_so(library: Library, of: str) -> None:
    tensors = {name: numbers(5, 64, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    tensors[of][2, 3] = float("nan")
    assert CrossAttention(library, 32, None, 0)(*tensors.values()).isnan().any()
    heads = (torch.unflatten(x, 1, (2, 32)) for x in tensors.values())
    assert LinearAttention(library)(*heads).isnan().any()


def test_offers_only_what_it_computes(library: Library) -> None:
    assert linear_attention.computes(32, library)
    assert not linear_attention.computes(28, library) or library.lanes == 4
    assert not linear_attention.computes(library.lanes + 1, library)
