"""The sum of the residual stream, LayerNorm and modulation in C, in one pass over the tokens.

Shapes: N tokens, D width, a multiple of the library's lanes. Tensors of tokens are fp32 or bf16, others fp32.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backends.cpu.kernels.library import Library

_POINTERS = ("x", "added", "gate", "sum", "shift", "scale", "normed")


class _Norm(ctypes.Structure):
    """The arguments of `modulated_norm`, as struct norm in norms.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "length")),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
        ("eps", ctypes.c_float),
    )


class Residual:
    """The residual stream of a block: the calls between its products."""

    def __init__(self, library: Library, eps: float) -> None:
        self._library, self._eps = library, eps

    def normed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Returns LayerNorm(x) * (1 + scale) + shift. x [N, D]; shift, scale [D]."""
        normed = torch.empty_like(x)
        self._run(x=x, shift=shift, scale=scale, normed=normed)
        return normed

    def add(self, x: Tensor, added: Tensor, gate: Tensor, out: Tensor) -> None:
        """Writes x + gate * added to `out`, which may be x. gate [D]."""
        self._run(x=x, added=added, gate=gate, sum=out)

    def add_normed(self, x: Tensor, added: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Adds to x in place. Returns LayerNorm(x) * (1 + scale) + shift."""
        normed = torch.empty_like(x)
        self._run(x=x, added=added, sum=x, shift=shift, scale=scale, normed=normed)
        return normed

    def _run(self, **tensors: Tensor) -> None:
        x = tensors["x"]
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            of_channels = name in ("gate", "shift", "scale")
            assert tensor.shape == (x.shape[1:] if of_channels else x.shape)
            assert tensor.dtype == (torch.float32 if of_channels else x.dtype)
        call = _Norm(
            rows=x.shape[0],
            length=x.shape[1],
            bf16=x.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            eps=self._eps,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        self._library.run("modulated_norm", call)


def norm_pointers(norms: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """Returns the weights of the RMSNorms of queries and keys as both attentions take them; null without norms."""
    if norms is None:
        return {}
    assert all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in norms)
    return {"q_weight": norms[0].data_ptr(), "k_weight": norms[1].data_ptr()}


def computes_right(library: Library) -> bool:
    """Returns whether sum and norm of 3 tokens equal PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    width = 2 * library.lanes
    x, added = torch.randn((2, 3, width), generator=generator)
    gate, shift, scale = torch.randn((3, width), generator=generator)
    residual = Residual(library, 1e-6)
    gated, summed = x.clone(), x.clone()
    residual.add(x, added, gate, gated)
    normed = residual.add_normed(summed, added, shift, scale)
    expected = F.layer_norm(x + added, (width,), eps=1e-6) * (1 + scale) + shift
    pairs = ((gated, x + gate * added), (summed, x + added), (normed, expected))
    return all(torch.allclose(got, right, rtol=0, atol=1e-5) for got, right in pairs)
