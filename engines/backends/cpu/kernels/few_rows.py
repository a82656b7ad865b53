"""Linear maps of a few rows in bf16, in C: those of a prompt, which read all weights of the text encoder once.

few_rows.c reads them at the memory's rate: 2.7 ms for 4.3 with oneDNN at 20 rows (2304 to 9216, two Zen 4 cores). A
row is the same in any batch.
"""

import ctypes

import torch
from torch import Tensor, nn

from engines.backends.cpu.kernels.library import Library

_POINTERS, _SIZES = ("x", "w", "y"), ("rows", "in", "out")
_WIDTH, _OUTPUTS = 32, 4  # what divides the inputs and the outputs


class _Product(ctypes.Structure):
    """The arguments of `few_rows`, as struct product in few_rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int32),
    )


class FewRowsLinear(nn.Module):
    """Computes as a Linear without bias whose weights it shares; bf16 on a CPU with bf16 products."""

    def __init__(self, linear: nn.Linear, library: Library) -> None:
        super().__init__()
        self.weight = linear.weight
        self._library = library

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty((*x.shape[:-1], len(self.weight)))
        if y.numel():
            _multiply(self._library, x.contiguous(), self.weight, y)
        return y


def _multiply(library: Library, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Writes x [..., in] times the transposed weight [out, in] to y [..., out]."""
    assert x.dtype == weight.dtype == y.dtype == torch.bfloat16
    assert x.shape[-1] == weight.shape[1]
    call = _Product(
        x=x.data_ptr(),
        w=weight.data_ptr(),
        y=y.data_ptr(),
        rows=y.numel() // len(weight),
        out=len(weight),
        threads=torch.get_num_threads(),
        **{"in": x.shape[-1]},
    )
    library.run("few_rows", call)


def computes(module: nn.Module, library: Library) -> bool:
    """Returns whether a FewRowsLinear can take the place of a module."""
    if type(module) is not nn.Linear or set(dict(module.named_parameters())) != {"weight"}:
        return False
    weight = module.weight
    fits = weight.shape[1] % _WIDTH == 0 and weight.shape[0] % _OUTPUTS == 0
    return fits and library.bf16_products and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def replace_linears(module: nn.Module, library: Library) -> int:
    """Replaces the Linears in `module` that it computes. Returns how many."""
    names = [name for name, part in module.named_modules() if computes(part, library)]
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, FewRowsLinear(linear, library))
    return len(names)


def computes_right(library: Library) -> bool:
    """Returns whether a product of 7 rows equals PyTorch's."""
    if not library.bf16_products:
        return True
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn((rows, _WIDTH), generator=generator).bfloat16() for rows in (7, 2 * _OUTPUTS))
    y = torch.full((len(x), len(weight)), float("nan"), dtype=torch.bfloat16)
    _multiply(library, x, weight, y)
    return torch.allclose(y.float(), x.float() @ weight.float().T, rtol=0.01, atol=0.05)
