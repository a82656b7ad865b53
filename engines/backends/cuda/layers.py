"""Linear maps as the kernels read them: fused, with adapters, or in 8 bits."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.kernels.e4m3 import FP8, FP8_MAX, input_scale
from engines.kernels.scaled_product import MULTIPLE
from engines.models.lora import AdapterStack


class LinearLayer(NamedTuple):
    """Weight [out, in] and bias [out] of a product; stacks: (first output, adapters of the jobs).

    In 8 bits the weight is e4m3. input_scale: that of the inputs, for the kernel that writes them. scales: those of
    inputs and weight, fp32 [] each, for the product.
    """

    weight: Tensor
    bias: Tensor | None
    stacks: tuple[tuple[int, AdapterStack], ...] = ()
    input_scale: float | None = None
    scales: tuple[Tensor, Tensor] | None = None

    @property
    def takes_fp8(self) -> bool:
        """True if the layer can be in 8 bits: in bf16, of widths that cuBLAS takes, without adapters."""
        return self.weight.dtype == torch.bfloat16 and not (self.stacks or any(n % MULTIPLE for n in self.weight.shape))

    def to_fp8(self, largest: float) -> "LinearLayer":
        """Returns the layer in 8 bits for inputs up to twice `largest`, the largest one in calibration."""
        weight, scale = self.weight.float(), input_scale(largest)
        weight_scale = weight.abs().amax().clamp_min(1e-12) / FP8_MAX
        scales = (torch.full((), scale, device=weight.device), weight_scale)
        return self._replace(weight=(weight / weight_scale).to(FP8), input_scale=scale, scales=scales)


def product(x: Tensor, layer: LinearLayer) -> Tensor:
    """Returns x [M, in] times `layer`, [M, out]; the rows of a job are adjacent."""
    y = F.linear(x, layer.weight, layer.bias)
    for start, stack in layer.stacks:
        part = y[:, start : start + stack.up.shape[1]]
        part.copy_(stack.add(x, part))
    return y


def grouped_product(x: Tensor, layer: LinearLayer) -> Tensor:
    """Applies G linear maps, stacked as [G*out, in], to x [G, B, in]; returns [G, B, out]."""
    weight = torch.unflatten(layer.weight, 0, (x.shape[0], -1))
    assert layer.bias is not None
    y = torch.baddbmm(torch.unflatten(layer.bias, 0, (x.shape[0], 1, -1)), x, weight.mT)
    for start, stack in layer.stacks:
        group = start // y.shape[2]
        y[group] = stack.add(x[group], y[group])
    return y


def layer_of(module: nn.Module) -> LinearLayer:
    """Returns a linear map or 1x1 convolution as LinearLayer, without a copy."""
    weight, bias = cast(Tensor, module.weight).detach(), cast("Tensor | None", module.bias)
    return LinearLayer(weight.flatten(1), None if bias is None else bias.detach(), stacks_of(module))


def stacks_of(module: nn.Module, start: int = 0) -> tuple[tuple[int, AdapterStack], ...]:
    stack = getattr(module, "stack", None)
    return ((start, stack),) if isinstance(stack, AdapterStack) else ()


def fuse_layers(layers: Iterable[Any]) -> LinearLayer:
    """Concatenates the outputs of linear maps; their parameters become views of the result."""
    layers = list(layers)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    start, stacks = 0, list[tuple[int, AdapterStack]]()
    for layer in layers:
        rows = layer.weight.shape[0]
        stacks += stacks_of(layer, start)
        layer.weight = nn.Parameter(weight[start : start + rows], requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias[start : start + rows], requires_grad=False)
        start += rows
    return LinearLayer(weight, bias, tuple(stacks))
