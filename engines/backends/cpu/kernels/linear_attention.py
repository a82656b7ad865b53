"""ReLU linear attention in C: of the transformer, and of the decoder.

Shapes: N tokens or pixels, H heads of d, a multiple of the library's lanes. Tensors [N, H, d] are fp32 or bf16 and may
lie apart in rows and heads; sums are fp32.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.norms import norm_pointers

_POINTERS = ("q", "k", "v", "q_weight", "k_weight", "y")
_SIZES = ("rows", "heads", "size", "to_row", "to_head", "y_to_row")
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
    """Attention. norms: weights of queries' and keys' RMSNorms over all heads [H * d] in fp32, or None."""

    def __init__(self, library: Library, norms: tuple[Tensor, Tensor] | None = None, eps: float = 0) -> None:
        self._library, self._norms, self._eps = library, norms, eps

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns [N, H, d] of three [N, H, d] with equal strides."""
        out = torch.empty(query.shape, dtype=query.dtype)
        self.write(query, key, value, out)
        return out

    def write(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Writes the result to `out` [N, H, d], whose heads are side by side."""
        rows, heads, size = query.shape
        for x in (query, key, value):
            assert x.shape == out.shape
            assert x.dtype == out.dtype
            assert x.stride() == (*query.stride()[:2], 1)
        assert out.stride()[1:] == (size, 1)
        call = _Attention(
            q=query.data_ptr(),
            k=key.data_ptr(),
            v=value.data_ptr(),
            y=out.data_ptr(),
            rows=rows,
            heads=heads,
            size=size,
            to_row=query.stride(0),
            to_head=query.stride(1),
            y_to_row=out.stride(0),
            bf16=query.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            eps=self._eps,
            **norm_pointers(self._norms),
        )
        self._library.run("linear_attention", call)


def computes(head_dim: int, library: Library) -> bool:
    return head_dim % library.lanes == 0 and head_dim % _STEP == 0


def reference(query: Tensor, key: Tensor, value: Tensor, norms: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Computes in PyTorch as a LinearAttention: [N, H, d]."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.flatten(1), (x[0].numel(),), weight.to(x.dtype), eps).view(x.shape)

    pairs = zip((query, key), norms, strict=True)
    q, k, v = (x.transpose(0, 1) for x in (*(F.relu(normed(x, weight)) for x, weight in pairs), value))  # [H, N, d]
    return ((q @ (k.mT @ v)) / (q @ k.sum(1).unsqueeze(2) + 1e-15)).transpose(0, 1)


def computes_right(library: Library) -> bool:
    """Returns whether two heads over 5 tokens equal the reference."""
    generator = torch.Generator().manual_seed(0)
    head_dim = max(library.lanes, _STEP)
    query, key, value = torch.randn((5, 6, head_dim), generator=generator).chunk(3, dim=1)
    weights = torch.randn((2, 2 * head_dim), generator=generator)
    norms = weights[0], weights[1]
    got = torch.full(query.shape, float("nan"))
    LinearAttention(library, norms, 1e-5).write(query, key, value, got)
    return torch.allclose(got, reference(query, key, value, norms, 1e-5), rtol=0, atol=1e-4)
