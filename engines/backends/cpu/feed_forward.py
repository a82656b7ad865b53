"""The transformer's feed-forward (engines.models.layers.GLUMBConv) on a CPU, with its middle in C.

Between two products in 8 bits, the unscaled sums of the first are read, and rows are written rounded for the second.

Shapes: [B, C, h, w], channels-last in memory.
"""

import torch
from torch import Tensor, nn

from engines.backends.cpu.int8_products import Int8Pointwise
from engines.backends.cpu.kernels.gated_depthwise import GatedDepthwise, computes
from engines.backends.cpu.kernels.library import Library
from engines.models.layers import GLUMBConv


class GatedFeedForward(nn.Module):
    """Computes as a GLUMBConv without norm and residual, whose products it shares."""

    def __init__(self, block: GLUMBConv, library: Library) -> None:
        super().__init__()
        self.conv_inverted: nn.Module = block.conv_inverted
        self.conv_point: nn.Module = block.conv_point
        self._middle = GatedDepthwise(library, block.conv_depth, silu=True)

    def forward(self, x: Tensor) -> Tensor:
        images = [self._of_image(image) for image in torch.split(x, 1)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _of_image(self, x: Tensor) -> Tensor:
        first, last = self.conv_inverted, self.conv_point
        if isinstance(first, Int8Pointwise) and isinstance(last, Int8Pointwise):
            sums, scales = first.unscaled(x)
            return last.of_rounded(*self._middle.rounded(sums, scales, first.bias), x)
        out: Tensor = last(self._middle(first(x).contiguous(memory_format=torch.channels_last)))
        return out


def replace_feed_forwards(module: nn.Module, library: Library) -> int:
    """Replaces those in `module` that a GatedFeedForward computes. Returns how many."""
    blocks = {name: part for name, part in module.named_modules() if isinstance(part, GLUMBConv)}
    plain = {name: part for name, part in blocks.items() if part.norm is None and not part.residual}
    computed = {name: part for name, part in plain.items() if computes(part.conv_depth, library)}
    for name, block in computed.items():
        module.set_submodule(name, GatedFeedForward(block, library))
    return len(computed)
