"""Linear maps on a CPU with their weights in oneDNN's layout, which PyTorch's own call converts them to every time.

In bf16 that saves 10 %, in fp32 a third to a half (PyTorch's own fp32 is not oneDNN's). The operators are those that
torch.compile's CPU backend calls (torch/_inductor/fx_passes/mkldnn_fusion.py).

Shapes: rows [N, in], weight [out, in].
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cpu.kernels.layout import pixel_rows


class Product(Protocol):
    """Computes rows [N, out] of rows [N, in]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


ProductFactory = Callable[[Tensor, Tensor | None], Product]  # of a weight and a bias [out]


class PackedLinear:
    """Product with packed weights, of which it holds a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class PlainLinear:
    """Product by PyTorch's own call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.detach(), bias if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def exact_products(dtype: torch.dtype) -> ProductFactory:
    """Returns the faster factory for `dtype` on this CPU."""
    return PackedLinear if has_onednn(dtype) else PlainLinear


def has_onednn(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN computes in `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Maps:
    """Linear maps or 1x1 convolutions that read the same rows: one product, if all are PyTorch's own."""

    def __init__(self, modules: Sequence[nn.Module], make: ProductFactory) -> None:
        groups = [modules] if all(map(_is_plain, modules)) else [[module] for module in modules]
        self._products = [_product(group, make) for group in groups]
        self._of_product = len(modules) // len(groups)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the rows [N, out] of each map, which may lie apart in memory, all at one distance."""
        return tuple(part for product in self._products for part in product(x).chunk(self._of_product, dim=1))


def product_of(module: nn.Module, make: ProductFactory) -> Product:
    """Returns what computes a linear map or a 1x1 convolution; one with adapters, or quantised, stays as it is."""
    return _product([module], make)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Conv2d)


def _product(modules: Sequence[nn.Module], make: ProductFactory) -> Product:
    if not _is_plain(modules[0]):
        return modules[0] if isinstance(modules[0], nn.Linear) else _convolution_of_rows(modules[0])
    weights = [_tensor(module.weight).flatten(1) for module in modules]
    biases = [_tensor(module.bias) for module in modules if module.bias is not None]
    assert len(biases) in (0, len(modules))
    return make(torch.cat(weights), torch.cat(biases) if biases else None)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach()


def _convolution_of_rows(conv: nn.Module) -> Product:
    return lambda x: pixel_rows(conv(x.view(1, 1, *x.shape).permute(0, 3, 1, 2))).contiguous()
