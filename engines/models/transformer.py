"""The Sprint transformer: noisy latent, text and time to flow velocity.

Parameter names are those of diffusers' SanaTransformer2DModel, so a published checkpoint loads strictly and unchanged.
Source: the paper's section 3 and diffusers models/transformers/sana_transformer.py; self-attention after
SanaLinearAttnProcessor2_0.

Shapes: B jobs, C latent channels, h x w latent, N = h*w image tokens, T text tokens, H heads of d, D = H*d.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.models.embeddings import MLP, PatchEmbed, TimeEmbed, TimeGuidanceEmbed
from engines.models.layers import GLUMBConv, RMSNorm

# Keys of a diffusers config.json with one supported value, which every Sprint checkpoint has.
_FIXED = {"dropout": 0.0, "patch_size": 1, "norm_elementwise_affine": False}
# Diffusers writes these keys; they do not affect the forward pass.
_IGNORED = {"timestep_scale"}


@dataclass(frozen=True)
class TransformerConfig:
    """Configuration, with names and defaults of diffusers' transformer/config.json."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None

    @property
    def dim(self) -> int:
        """D, the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        if cross != self.dim:
            raise ValueError(
                f"cross-attention width {cross} (heads x head_dim) differs from the width {self.dim}; they must agree"
            )
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"qk_norm: got {self.qk_norm!r}, supported: null, 'rms_norm_across_heads'")
        if self.interpolation_scale is not None and (self.interpolation_scale <= 0 or self.dim % 4):
            raise ValueError(
                f"interpolation_scale: got {self.interpolation_scale} at width {self.dim}; "
                "a positional embedding needs a positive scale and a width that is a multiple of 4"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "TransformerConfig":
        """Reads a diffusers transformer/config.json. Raises ValueError with the key of an unsupported value."""
        known = {field.name for field in fields(cls)}
        values = dict(config)
        if values.get("out_channels", 0) is None:
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        for key, value in values.items():
            if key in _FIXED and value != _FIXED[key]:
                raise ValueError(f"{key}: got {value!r}, supported: {_FIXED[key]!r}")
            if key not in known | _FIXED.keys() | _IGNORED | {"cross_attention_dim"} and not key.startswith("_"):
                raise ValueError(f"unknown key {key!r}; a SanaTransformer2DModel config.json is needed")
            kind = type(getattr(cls, key, None))
            if kind in (bool, int, float) and type(value) is not kind and (kind, type(value)) != (float, int):
                raise ValueError(f"{key}: got {value!r}, needed is a value like {getattr(cls, key)!r}")
        parsed = cls(**{key: value for key, value in values.items() if key in known})  # type: ignore[arg-type]  # checked
        cross_dim = config.get("cross_attention_dim", parsed.dim)
        if cross_dim != parsed.dim:
            raise ValueError(f"cross_attention_dim: got {cross_dim!r}, supported: {parsed.dim}, the width")
        return parsed

    def to_dict(self) -> dict[str, object]:
        """Returns the config.json that diffusers and `from_dict` read."""
        head = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.42.1"}
        return {**head, **asdict(self), **_FIXED, "cross_attention_dim": self.dim, "timestep_scale": 1.0}


SPRINT_1_6B = TransformerConfig(guidance_embeds=True, qk_norm="rms_norm_across_heads")
SPRINT_0_6B = TransformerConfig(
    num_attention_heads=36,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
)


# (index of a block, its output [B, N, D]) -> input of the next block.
Inject = Callable[[int, Tensor], Tensor]


def after_next_block(residuals: Sequence[Tensor]) -> Inject:
    """Returns an Inject that adds the i-th residual to the output of block i + 1, as SanaTransformer2DModel."""

    def inject(index: int, x: Tensor) -> Tensor:
        return x + residuals[index - 1] if 0 < index <= len(residuals) else x

    return inject


def attention_bias(text_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask [B, T], 1 keeps a token and 0 drops it, as a bias of attention scores: [B, 1, 1, T]."""
    return ((1 - text_mask.to(dtype)) * -10000.0)[:, None, None, :]


class Projections(nn.Module):
    """Linear maps of both attentions, and RMS norms of query and key over all heads together."""

    def __init__(self, dim: int, head_dim: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.norm_q = RMSNorm(dim) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries of x [B, N, D], keys and values of source [B, S, D]: [B, H, N or S, d]."""
        query, key, value = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source)), self.to_v(source)
        return self.heads(query), self.heads(key), self.heads(value)

    def heads(self, x: Tensor) -> Tensor:
        """Views [B, N, D] as [B, H, N, d]."""
        return torch.unflatten(x, 2, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Merges [B, H, N, d] to [B, N, D] and applies the output map."""
        merged: Tensor = self.to_out[0](x.transpose(1, 2).flatten(2))
        return merged


class LinearAttention(Projections):
    """ReLU linear self-attention in O(N*d); its products and the divide run in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x, x)
        query, key, value = F.relu(query).float(), F.relu(key).float(), value.float()
        context = key.transpose(2, 3) @ value  # [B, H, d, d]
        # Upstream's row of ones in the padded value. As row times matrix, because matrix times column is slow on CPUs.
        weight = (key.sum(2, keepdim=True) @ query.transpose(2, 3)).transpose(2, 3)  # [B, H, N, 1]
        out = self.merge(((query @ context) / (weight + 1e-15)).to(x.dtype))
        # Base Sana reaches 1e6 here, and its fp16 weights rely on the clip (diffusers issue 10336).
        return out.clip(-65504, 65504) if x.dtype == torch.float16 else out


class CrossAttention(Projections):
    """Softmax attention of image tokens [B, N, D] over projected text [B, T, D]; bias [B, 1, 1, T] or None."""

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.project(x, text), attn_mask=bias))


class Block(nn.Module):
    """Modulated linear attention, plain cross-attention (no norm before it), modulated GLUMBConv."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        normed = config.qk_norm is not None
        self.norm1 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=config.norm_eps)
        self.attn1 = LinearAttention(config.dim, config.attention_head_dim, config.attention_bias, normed)
        self.attn2 = CrossAttention(config.dim, config.cross_attention_head_dim, True, normed)
        self.norm2 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=config.norm_eps)
        self.ff = GLUMBConv(config.dim, config.mlp_ratio, norm=False, residual=False)
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(6, config.dim), std=config.dim**-0.5))

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, bias: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.attn2(x, text, bias)
        grid = torch.unflatten(self.norm2(x) * (1 + scale2) + shift2, 1, size).permute(0, 3, 1, 2)
        fed: Tensor = self.ff(grid)
        return x + gate2 * fed.flatten(2).transpose(1, 2)


class SprintTransformer(nn.Module):
    """The velocity network v(x, t | text, guidance).

    With a fixed schedule `conditioning` is constant per (timestep, guidance) and `project_text` per prompt, so they are
    separate; `velocity` is the work per step.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.in_channels, config.dim, config.sample_size, config.interpolation_scale)
        self.time_embed = TimeGuidanceEmbed(config.dim) if config.guidance_embeds else TimeEmbed(config.dim)
        self.caption_projection = MLP(config.caption_channels, config.dim, nn.GELU(approximate="tanh"))
        self.caption_norm = RMSNorm(config.dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(2, config.dim), std=config.dim**-0.5))
        self.norm_out = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(config.dim, config.out_channels)

    def conditioning(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeds flow time [B] in [0, 1] and guidance [B] (already times guidance_embeds_scale).

        Returns the modulation [B, 6, D] of all blocks and the embedding [B, D] that modulates the output. The
        modulation is shift, scale and gate of attention, then of the GLUMBConv. Raises ValueError if guidance is
        missing or not embedded.
        """
        modulation, embedded = self.time_embed(timestep, guidance)
        return torch.unflatten(modulation, 1, (6, -1)), embedded

    def project_text(self, text: Tensor) -> Tensor:
        """Projects text embeddings [B, T, caption_channels] to [B, T, D], which every cross-attention reads."""
        projected: Tensor = self.caption_norm(self.caption_projection(text))
        return projected

    def velocity(
        self,
        latent: Tensor,
        projected: Tensor,
        modulation: Tensor,
        embedded: Tensor,
        text_mask: Tensor | None = None,
        inject: Inject | None = None,
    ) -> Tensor:
        """Computes `forward` from the results of `project_text` and `conditioning`."""
        bias = None if text_mask is None else attention_bias(text_mask, latent.dtype)
        size = (latent.shape[-2], latent.shape[-1])
        x: Tensor = self.patch_embed(latent)
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, projected, modulation, bias, size)
            if inject is not None:
                x = inject(index, x)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        return torch.unflatten(x.transpose(1, 2), 2, size)

    def forward(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        text_mask: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Returns the flow velocity v [B, C, h, w] of `latent` [B, C, h, w].

        text [B, T, caption_channels]; timestep [B] in [0, 1]; guidance [B], already times guidance_embeds_scale, or
        None if the architecture does not embed it; text_mask [B, T], 1 keeps a token, None keeps all;
        control: residuals [B, N, D], the i-th added to the output of block i + 1.
        """
        modulation, embedded = self.conditioning(timestep, guidance)
        inject = None if control is None else after_next_block(control)
        return self.velocity(latent, self.project_text(text), modulation, embedded, text_mask, inject)
