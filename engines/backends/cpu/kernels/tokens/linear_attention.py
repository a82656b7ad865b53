"""ReLU linear attention (engines.models.transformer.LinearAttention) in C, from its projections to its output map.

Shapes: N tokens, H heads of d, a multiple of the library's lanes, D = H*d. Rows are fp32 or bf16; sums are fp32.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels.library import Library

_POINTERS = ("q", "k", "v", "q_weight", "k_weight", "y")
_SIZES = ("rows", "stride", "heads", "size")
_STEP = 8  # divides d: TOGETHER in linear_attention.c


class _Attention(ctypes.Structure):
    """The arguments of `linear_attention`, as struct attention in linear_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
        ("eps", ctypes.c_float),
    )


class LinearAttention:
    """Attention with heads of `head_dim`. norms: weights of queries' and keys' RMSNorms [D] in fp32, or None."""

    def __init__(self, library: Library, head_dim: int, norms: tuple[Tensor, Tensor] | None, eps: float) -> None:
        self._library, self._head_dim, self._norms, self._eps = library, head_dim, norms, eps

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns [N, D] of three [N, D], whose rows may lie apart, all at one distance."""
        out = torch.empty(query.shape, dtype=query.dtype)
        self.write(query, key, value, out)
        return out

    def write(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Writes the result to `out` [N, D]."""
        assert out.is_contiguous()
        assert out.dtype == query.dtype
        rows, width = query.shape
        stride = query.stride(0)
        for x in (query, key, value):
            assert x.shape == query.shape
            assert x.dtype == query.dtype
            assert x.stride() == (stride, 1)
        q_weight, k_weight = self._norms or (None, None)
        call = _Attention(
            q=query.data_ptr(),
            k=key.data_ptr(),
            v=value.data_ptr(),
            q_weight=None if q_weight is None else q_weight.data_ptr(),
            k_weight=None if k_weight is None else k_weight.data_ptr(),
            y=out.data_ptr(),
            rows=rows,
            stride=stride,
            heads=width // self._head_dim,
            size=self._head_dim,
            bf16=query.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            eps=self._eps,
        )
        self._library.run("linear_attention", call)


def computes(head_dim: int, library: Library) -> bool:
    return head_dim % library.lanes == 0 and head_dim % _STEP == 0


def reference(
    query: Tensor, key: Tensor, value: Tensor, head_dim: int, norms: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """Computes in PyTorch as a LinearAttention: [N, D]."""
    q, k = (
        F.relu(F.rms_norm(x.float(), x.shape[1:], weight, eps)) for x, weight in zip((query, key), norms, strict=True)
    )
    q, k, v = (torch.unflatten(x.float(), 1, (-1, head_dim)).transpose(0, 1) for x in (q, k, value))  # [H, N, d]
    out = (q @ (k.transpose(1, 2) @ v)) / (q @ k.sum(1).unsqueeze(2) + 1e-15)
    return out.transpose(0, 1).flatten(1)


def computes_right(library: Library) -> bool:
    """Returns whether two heads over 5 tokens equal the reference."""
    generator = torch.Generator().manual_seed(0)
    head_dim = max(library.lanes, _STEP)
    query, key, value = torch.randn((5, 6 * head_dim), generator=generator).chunk(3, dim=1)
    weights = torch.randn((2, 2 * head_dim), generator=generator)
    norms = weights[0], weights[1]
    got = torch.full(query.shape, float("nan"))
    LinearAttention(library, head_dim, norms, 1e-5).write(query, key, value, got)
    return torch.allclose(got, reference(query, key, value, head_dim, norms, 1e-5), rtol=0, atol=1e-4)
