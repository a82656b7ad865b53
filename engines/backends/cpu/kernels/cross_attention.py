"""Softmax attention over a prompt (engines.models.transformer.CrossAttention) in C, between its products.

Shapes: N image tokens, T text tokens, H heads of d, D = H*d, a multiple of the library's lanes. Rows are fp32 or bf16;
sums are fp32.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.norms import norm_pointers

_POINTERS = ("q", "k", "v", "q_weight", "k_weight", "y")
_SIZES = ("rows", "tokens", "stride", "heads", "size")


class _Attention(ctypes.Structure):
    """The arguments of `cross_attention`, as struct attention in cross_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
        ("eps", ctypes.c_float),
    )


class CrossAttention:
    """Attention with heads of `head_dim`. norms: weights of queries' and keys' RMSNorms [D] in fp32, or None."""

    def __init__(self, library: Library, head_dim: int, norms: tuple[Tensor, Tensor] | None, eps: float) -> None:
        self._library, self._head_dim, self._norms, self._eps = library, head_dim, norms, eps

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns [N, D] of queries [N, D], keys and values [T, D], whose rows may lie apart, both at one distance."""
        out = torch.empty_like(query)
        self.write(query, key, value, out)
        return out

    def write(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Writes the result to `out` [N, D]."""
        assert out.is_contiguous()
        assert out.dtype == query.dtype
        assert query.is_contiguous()
        assert key.stride() == value.stride() == (key.stride(0), 1)
        assert key.shape == value.shape == (len(key), query.shape[1])
        assert query.dtype == key.dtype == value.dtype
        call = _Attention(
            q=query.data_ptr(),
            k=key.data_ptr(),
            v=value.data_ptr(),
            y=out.data_ptr(),
            rows=len(query),
            tokens=len(key),
            stride=key.stride(0),
            heads=query.shape[1] // self._head_dim,
            size=self._head_dim,
            bf16=query.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            eps=self._eps,
            **norm_pointers(self._norms),
        )
        self._library.run("cross_attention", call)


def reference(
    query: Tensor, key: Tensor, value: Tensor, head_dim: int, norms: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """Computes in PyTorch as a CrossAttention: [N, D]."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[1:], weight.to(x.dtype), eps)

    rows = (*(normed(x, weight) for x, weight in zip((query, key), norms, strict=True)), value)
    q, k, v = (torch.unflatten(x, 1, (-1, head_dim)).transpose(0, 1) for x in rows)  # [H, N or T, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


def computes_right(library: Library) -> bool:
    """Returns whether four heads of an odd size over 3 text tokens equal the reference."""
    generator = torch.Generator().manual_seed(0)
    head_dim = library.lanes + library.lanes // 2
    query, key, value = (torch.randn((rows, 4 * head_dim), generator=generator) for rows in (9, 3, 3))
    weights = torch.randn((2, 4 * head_dim), generator=generator)
    norms = weights[0], weights[1]
    got = torch.full(query.shape, float("nan"))
    CrossAttention(library, head_dim, norms, 1e-5).write(query, key, value, got)
    return torch.allclose(got, reference(query, key, value, head_dim, norms, 1e-5), rtol=0, atol=1e-4)
