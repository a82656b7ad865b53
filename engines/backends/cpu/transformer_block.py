"""A block of the transformer on a CPU: products by oneDNN, and all that lies between them in C.

Shapes: N image tokens, T text tokens, D width; rows [N, D] of one job.
"""

import torch
from torch import Tensor, nn

from engines.backends.cpu.int8_products import Int8Linear
from engines.backends.cpu.kernels import gated_depthwise, linear_attention
from engines.backends.cpu.kernels.cross_attention import CrossAttention
from engines.backends.cpu.kernels.gated_depthwise import GatedDepthwise
from engines.backends.cpu.kernels.layout import pixel_rows
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.kernels.linear_attention import LinearAttention
from engines.backends.cpu.kernels.norms import Residual
from engines.backends.cpu.packed_linear import Maps, ProductFactory, exact_products, product_of
from engines.models.layers import GLUMBConv, RMSNorm
from engines.models.transformer import Block, Projections


class CpuBlock(nn.Module):
    """Computes as Block for one job without padding of its text. Copies the weights of a loaded block; fp32 or bf16."""

    def __init__(self, block: Block, library: Library, make: ProductFactory) -> None:
        """`make` builds the products of image tokens; those of the text are exact."""
        super().__init__()
        self._table = block.scale_shift_table
        self._residual = Residual(library, block.norm1.eps)
        own, cross = block.attn1, block.attn2
        self._project = Maps([own.to_q, own.to_k, own.to_v], make)
        self._attend, self._head_dim = LinearAttention(library, *_norms_of(own)), own.head_dim
        self._out = product_of(own.to_out[0], make)
        self._query = product_of(cross.to_q, make)
        self._project_text = Maps([cross.to_k, cross.to_v], exact_products(self._table.dtype))
        self._attend_text = CrossAttention(library, cross.head_dim, *_norms_of(cross))
        self._out_of_text = product_of(cross.to_out[0], make)
        self._feed = FeedForward(block.ff, library, make)

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, bias: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        assert len(x) == len(text) == 1
        assert bias is None
        shift1, scale1, gate1, shift2, scale2, gate2 = (self._table + modulation)[0].float().unbind()
        rows, stream = x[0].contiguous(), torch.empty(x.shape[1:], dtype=x.dtype)
        heads = (self._heads(part) for part in self._project(self._residual.normed(rows, shift1, scale1)))
        self._residual.add(rows, self._out(self._attend(*heads).flatten(1)), gate1, stream)
        attended = self._attend_text(self._query(stream), *self._project_text(text[0]))
        normed = self._residual.add_normed(stream, self._out_of_text(attended), shift2, scale2)
        self._residual.add(stream, self._feed(normed, size), gate2, stream)
        return stream[None]

    def _heads(self, rows: Tensor) -> Tensor:
        """Views [N, D] as [N, H, d]."""
        return torch.unflatten(rows, 1, (-1, self._head_dim))


class FeedForward:
    """Computes as a GLUMBConv without norm and residual.

    Between two products in 8 bits, it reads the unscaled sums of the first, and writes rows rounded for the second.
    """

    def __init__(self, block: GLUMBConv, library: Library, make: ProductFactory) -> None:
        self._first, self._last = product_of(block.conv_inverted, make), product_of(block.conv_point, make)
        self._middle = GatedDepthwise(library, block.conv_depth, silu=True)
        self._bias = torch.empty(0) if block.conv_inverted.bias is None else block.conv_inverted.bias.detach().float()

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns [N, D] of x [N, D], an image of height and width `size`."""
        first, last = self._first, self._last
        if isinstance(first, Int8Linear) and isinstance(last, Int8Linear):
            sums, scales = first.unscaled(x)
            return last.of_rounded(*self._middle.rounded(_as_image(sums, size), scales, self._bias))
        return last(pixel_rows(self._middle(_as_image(first(x), size))))


def _as_image(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Views [H*W, C] as [1, C, H, W]."""
    return rows.contiguous().view(1, *size, -1).permute(0, 3, 1, 2)


def _norms_of(attention: Projections) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """Returns the weights of the norms of queries and keys, if there are any, and their eps."""
    query, key = attention.norm_q, attention.norm_k
    if not isinstance(query, RMSNorm) or not isinstance(key, RMSNorm):
        return None, 0.0
    return (query.weight.detach().float(), key.weight.detach().float()), query.eps


def computes(block: nn.Module, library: Library) -> bool:
    """Returns whether a CpuBlock can take the place of a module."""
    if not isinstance(block, Block) or not gated_depthwise.computes(block.ff.conv_depth, library):
        return False
    width, lanes = block.scale_shift_table.shape[1], library.lanes
    fits = width % lanes == 0 and linear_attention.computes(block.attn1.head_dim, library)
    return fits and block.scale_shift_table.dtype in (torch.float32, torch.bfloat16)


def replace_blocks(module: nn.Module, library: Library, make: ProductFactory) -> bool:
    """Replaces those blocks in `module` that it computes, one after the other. Returns whether there was one."""
    names = [name for name, part in module.named_modules() if computes(part, library)]
    for name in names:
        block = module.get_submodule(name)
        assert isinstance(block, Block)
        module.set_submodule(name, CpuBlock(block, library, make))
    return bool(names)
