"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the matrices of the blocks.

torch.optim.Muon takes two-dimensional parameters only, but half of a Sana block's weights are 1x1 convolutions. Equal
shapes run as one batched product. Source: Jordan et al. 2024 (coefficients). As in arXiv 2502.16982 the update has the
root mean square of AdamW's, so that both share a learning rate.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits trained parameters into matrices and 1x1 convolutions of blocks (for Muon) and the rest (for AdamW)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = "transformer_blocks." in name or "encoder.layers." in name
            pointwise = parameter.ndim >= 2 and parameter.shape[1] > 1 and parameter.shape[2:].numel() == 1
            is_matrix = inside and pointwise and "scale_shift_table" not in name
            (matrices if is_matrix else others).append(parameter)
    return matrices, others


def orthogonalise(matrices: Tensor) -> Tensor:
    """Moves the singular values of [K,m,n] matrices near 1."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return orthogonal


class Muon(torch.optim.Optimizer):
    """For weights [m,n] and [m,n,1,1]. Step: w <- w - lr * 0.2 * sqrt(max(m,n)) * orthogonalise(nesterov momentum)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        """Updates the weights once. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                updates = []
                for parameter in parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]).flatten(1))
                directions = orthogonalise(torch.stack(updates))
                scale = 0.2 * max(directions.shape[-2:]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)
