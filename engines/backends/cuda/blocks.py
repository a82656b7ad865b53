"""Blocks of the transformer and of a ControlNet's copies, with their conditioning, image tokens and prompts.

They compute what engines.models.transformer computes, by exact algebra with less work:

- q, k and v are one product.
- The rms of a linear attention's query cancels in its quotient.
- Keys and values of all blocks are one product per prompt.
- All modulations are one addition.

A kernel sums in fp32 and rounds once, at its end. In 8 bits the kernel before a product writes its input in e4m3.

Shapes: B jobs, C latent channels, h x w latent, N = h*w image tokens, T text tokens, L blocks, D width. Tokens are
[B*N, D] between kernels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cuda.layers import LinearLayer, fuse_layers, grouped_product, layer_of, product, stacks_of
from engines.errors import BackendError
from engines.kernels.cross_attention import CROSS_ATTENTION, KEY_NORM
from engines.kernels.gated_depthwise import GATED_DEPTHWISE
from engines.kernels.linear_attention import LINEAR_ATTENTION
from engines.kernels.modulated_norm import MODULATED_NORM, RESIDUAL, RESIDUAL_FP8, RESIDUAL_NORM
from engines.kernels.op import Ops
from engines.kernels.scaled_product import SCALED_PRODUCT
from engines.kernels.silu_product import SILU_PRODUCT
from engines.models.embeddings import PatchEmbed, TimeEmbed, TimeGuidanceEmbed, frequencies, positions
from engines.models.layers import RMSNorm
from engines.models.transformer import TransformerConfig


class PreparedText(NamedTuple):
    """Prompts as the blocks read them: normalised keys and values [B*T, L*2*D]; lengths [B] int32."""

    kv: Tensor
    lengths: Tensor


class Pending(NamedTuple):
    """Term gate * y + extra that is not yet added to the residual stream: y, extra [B*N, D], gate [B, D]."""

    y: Tensor
    gate: Tensor | None = None
    extra: Tensor | None = None


class _Weights(NamedTuple):
    qkv: LinearLayer
    key_weight: Tensor | None  # [D] fp32: k's norm weight times |q's norm weight|
    out: LinearLayer
    query: LinearLayer
    cross_out: LinearLayer
    expand: LinearLayer
    taps: Tensor  # [9, 2*hidden]
    taps_bias: Tensor
    project: LinearLayer


# Products that 8 bits make faster. Left out: `out`, with 40 % of the error for 7 % of the arithmetic (bench/LOG.md);
# a prompt's keys and values, whose input would need a launch to round it.
FP8_PRODUCTS = ("qkv", "query", "cross_out", "expand", "project")

# (index of a block, its residual stream, its pending term) -> both, with additions.
Inject = Callable[[int, Tensor, Pending], tuple[Tensor, Pending]]


class Blocks:
    """Transformer blocks with weights laid out for the kernels; the modules' parameters become views of these."""

    def __init__(self, blocks: nn.ModuleList, config: TransformerConfig, ops: Ops):
        self._ops, self._config = ops, config
        self._has_qk_norm = config.qk_norm is not None
        modules: list[Any] = list(blocks)
        crosses = [block.attn2 for block in modules]
        self.keys_values = fuse_layers([layer for cross in crosses for layer in (cross.to_k, cross.to_v)])
        scale = config.cross_attention_head_dim**-0.5
        self._key_weights = torch.stack([_norm_weights(cross, config.dim) * scale for cross in crosses])
        self.tables = torch.stack([block.scale_shift_table.detach() for block in modules])  # [L, 6, D]
        for block, table in zip(modules, self.tables, strict=True):
            block.scale_shift_table = nn.Parameter(table, requires_grad=False)
        self._weights = [self._block_weights(block) for block in modules]
        first = modules[0]
        self._norm_eps: float = first.norm1.eps
        self._rms_eps: float = first.attn1.norm_k.eps if self._has_qk_norm else 0.0
        self.calibrates = False  # if True, a run extends the ranges
        self.ranges = [[0.0] * len(FP8_PRODUCTS) for _ in modules]  # largest input of each of FP8_PRODUCTS

    def __len__(self) -> int:
        return len(self._weights)

    def _block_weights(self, block: Any) -> _Weights:
        own, cross, ff = block.attn1, block.attn2, block.ff
        key_weight = None
        if self._has_qk_norm:
            # relu(q * w) . relu(k) = relu(q * sign w) . (|w| * relu(k)): exact. The module computes the same as before.
            key_weight = own.norm_k.weight.detach().float() * own.norm_q.weight.detach().float().abs()
            sign = torch.where(own.norm_q.weight.detach() < 0, -1, 1).to(own.to_q.weight.dtype)
            own.norm_q.weight = nn.Parameter(own.norm_q.weight.detach().abs(), requires_grad=False)
            own.to_q.weight = nn.Parameter(own.to_q.weight.detach() * sign[:, None], requires_grad=False)
            if own.to_q.bias is not None:
                own.to_q.bias = nn.Parameter(own.to_q.bias.detach() * sign, requires_grad=False)
            for _, stack in stacks_of(own.to_q):
                stack.up.mul_(sign[:, None])
        return _Weights(
            qkv=fuse_layers([own.to_q, own.to_k, own.to_v]),
            key_weight=key_weight,
            out=layer_of(own.to_out[0]),
            query=layer_of(cross.to_q),
            cross_out=layer_of(cross.to_out[0]),
            expand=layer_of(ff.conv_inverted),
            taps=ff.conv_depth.weight.detach().flatten(1).t().contiguous(),
            taps_bias=ff.conv_depth.bias.detach(),
            project=layer_of(ff.conv_point),
        )

    def include_ranges(self, ranges: Sequence[Sequence[float]]) -> None:
        """Extends the ranges by those of another calibration."""
        self.ranges = [
            [max(pair) for pair in zip(*rows, strict=True)] for rows in zip(self.ranges, ranges, strict=True)
        ]

    def leave_in_bf16(self, product: str) -> None:
        """Makes `to_fp8` leave this one of FP8_PRODUCTS as it is, in all blocks: no scale fits an infinite range."""
        for largest in self.ranges:
            largest[FP8_PRODUCTS.index(product)] = math.inf

    def to_fp8(self, products: Sequence[str] = FP8_PRODUCTS) -> None:
        """Converts products to 8 bits, with scales from the ranges; layers that cannot be in 8 bits stay."""
        for index, (weights, largest) in enumerate(zip(self._weights, self.ranges, strict=True)):
            narrow = dict[str, Any]()
            for name, seen in zip(FP8_PRODUCTS, largest, strict=True):
                layer: LinearLayer = getattr(weights, name)
                if name in products and layer.takes_fp8 and math.isfinite(seen):
                    narrow[name] = layer.to_fp8(seen)
            self._weights[index] = weights._replace(**narrow)

    @contextmanager
    def one_in_fp8(self, product: str) -> Iterator[None]:
        """Has this one of FP8_PRODUCTS in 8 bits within the block, and none afterwards."""
        exact = list(self._weights)
        self.to_fp8((product,))
        try:
            yield
        finally:
            self._weights = exact

    def product(self, x: Tensor, layer: LinearLayer) -> Tensor:
        """Returns x [M, in] times `layer`, [M, out]; every product but the expansion's comes here."""
        if layer.scales is None:
            return product(x, layer)
        output: Tensor = self._ops(SCALED_PRODUCT, x, layer.weight, layer.bias, *layer.scales)
        return output

    def expansion(self, x: Tensor, layer: LinearLayer) -> Tensor:
        """Returns the SiLU of x [M, in] times `layer`, [M, out]."""
        if layer.stacks:
            return F.silu(product(x, layer))
        expanded: Tensor = self._ops(SILU_PRODUCT, x, layer.weight, layer.bias, *(layer.scales or ()))
        return expanded

    def _observe(self, index: int, **inputs: Tensor) -> None:
        """Extends the ranges of a block by the inputs of its products, where they are calibrated."""
        if self.calibrates:
            for name, x in inputs.items():
                at = FP8_PRODUCTS.index(name)
                self.ranges[index][at] = max(self.ranges[index][at], float(x.abs().amax()))

    def keys(self, projected: Tensor, lengths: Tensor) -> PreparedText:
        """Returns keys and values of all blocks for projected text [B, T, D]."""
        kv = self.product(projected.flatten(0, 1), self.keys_values)
        return PreparedText(self._ops(KEY_NORM, kv, self._key_weights, self._has_qk_norm, self._rms_eps), lengths)

    def modulations(self, modulation: Tensor) -> Tensor:
        """Returns the shared modulation [B, 6, D] plus each block's table: [B, L, 6, D]."""
        return self.tables + modulation[:, None]

    def block(
        self,
        index: int,
        x: Tensor,
        pending: Pending | None,
        modulations: Tensor,
        text: PreparedText,
        size: tuple[int, int],
    ) -> tuple[Tensor, Pending]:
        """Runs block `index` on x + pending; returns the residual stream [B*N, D] and its pending term."""
        ops, weights, batch = self._ops, self._weights[index], modulations.shape[0]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations[:, index].unbind(1)
        if pending is None:
            h = ops(MODULATED_NORM, x, scale1, shift1, batch, self._norm_eps, weights.qkv.input_scale)
        else:
            x, h = ops(RESIDUAL_NORM, x, *pending, scale1, shift1, batch, self._norm_eps, weights.qkv.input_scale)
        head_dim = self._config.attention_head_dim
        qkv = self.product(h, weights.qkv)
        self._observe(index, qkv=h)
        attended = ops(LINEAR_ATTENTION, qkv, weights.key_weight, batch, head_dim, self._rms_eps)
        y = self.product(attended, weights.out)
        if weights.query.input_scale is None:
            h = x = ops(RESIDUAL, x, y, gate1, None, batch)
        else:
            x, h = ops(RESIDUAL_FP8, x, y, gate1, None, batch, weights.query.input_scale)
        self._observe(index, query=h)
        query = self.product(h, weights.query)
        heads = self._config.num_cross_attention_heads
        attended = ops(
            CROSS_ATTENTION, query, text.kv, text.lengths, index, heads, self._has_qk_norm, self._rms_eps,
            weights.cross_out.input_scale,
        )  # fmt: skip
        y = self.product(attended, weights.cross_out)
        self._observe(index, cross_out=attended)
        x, h = ops(RESIDUAL_NORM, x, y, None, None, scale2, shift2, batch, self._norm_eps, weights.expand.input_scale)
        expanded = self.expansion(h, weights.expand)
        gated = ops(
            GATED_DEPTHWISE, expanded, weights.taps, weights.taps_bias, batch, *size, weights.project.input_scale
        )
        self._observe(index, expand=h, project=gated)
        return x, Pending(self.product(gated, weights.project), gate2)


class Conditioning:
    """Embeds time and guidance to the modulation of all blocks, with both embedders' products as one."""

    def __init__(self, embed: TimeGuidanceEmbed | TimeEmbed):
        self._guided = isinstance(embed, TimeGuidanceEmbed)
        if isinstance(embed, TimeGuidanceEmbed):
            embedders: list[Any] = [embed.timestep_embedder, embed.guidance_embedder]
        else:
            embedders = [embed.emb["timestep_embedder"]]
        self._first, self._second = (
            fuse_layers([getattr(embedder, name) for embedder in embedders]) for name in ("linear_1", "linear_2")
        )
        self._last = layer_of(embed.linear)
        self._frequencies = frequencies(self._last.weight.device)

    def __call__(self, timestep: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns modulation [B, 6, D] and output embedding [B, D], as SprintTransformer.conditioning.

        timestep, guidance [B]. Raises ValueError if guidance is missing or not embedded.
        """
        if (guidance is None) == self._guided:
            raise ValueError(f"guidance: got {guidance!r}; needed is a tensor [B] where it is embedded, else None")
        conditions = timestep[None] if guidance is None else torch.stack([timestep.float(), guidance.float()])
        angle = conditions[..., None].float() * self._frequencies
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1).to(self._last.weight.dtype)  # [1 or 2, B, 256]
        embedded = grouped_product(F.silu(grouped_product(sinusoids, self._first)), self._second).sum(0)
        modulation = product(F.silu(embedded), self._last)
        return torch.unflatten(modulation, 1, (6, -1)), embedded


def lengths_of(text: Tensor, text_mask: Tensor | None) -> Tensor:
    """Returns the length of each text [B, T, ...], int32 on its device; text_mask [B, T] keeps a first part of each."""
    if text_mask is None:
        return torch.full((text.shape[0],), text.shape[1], dtype=torch.int32, device=text.device)
    return text_mask.sum(1, dtype=torch.int32)


def image_tokens(embed: PatchEmbed, latent: Tensor, with_positions: bool = True) -> Tensor:
    """Embeds a latent [B, C, h, w] as tokens [B*N, D], as PatchEmbed, optionally without its positions."""
    batch, channels, height, width = latent.shape
    flat = latent.permute(0, 2, 3, 1).reshape(-1, channels)
    x = product(flat, layer_of(embed.proj))
    if embed.scale is None or embed.pos_embed is None or not with_positions:
        return x
    table = embed.pos_embed
    if (height, width) != (embed.base, embed.base):
        table = positions(x.shape[1], height, width, embed.base, embed.scale, x.device)
    return (torch.unflatten(x, 0, (batch, -1)) + table).to(x.dtype).flatten(0, 1)


def project_text(projection: nn.Module, norm: RMSNorm, text: Tensor) -> Tensor:
    """Projects text [B, T, caption_channels] to [B, T, D], from which keys and values are computed."""
    projected: Tensor = projection(text)
    return F.rms_norm(projected, projected.shape[-1:], norm.weight, norm.eps)


def supported_dtype(module: nn.Module) -> torch.dtype:
    """Returns the type of the module's weights. Raises BackendError unless it is bf16 or fp32."""
    dtype = next(module.parameters()).dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise BackendError(f"CUDA transformer: weights are {dtype}; supported are torch.bfloat16 and torch.float32")
    return dtype


def _norm_weights(cross: Any, dim: int) -> Tensor:
    """Returns the product of the query's and the key's norm weights: [D] fp32."""
    if isinstance(cross.norm_q, nn.Identity):
        return torch.ones(dim, device=cross.to_q.weight.device)
    product: Tensor = cross.norm_q.weight.detach().float() * cross.norm_k.weight.detach().float()
    return product
