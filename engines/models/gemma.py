"""Gemma-2 without its language head: token ids to hidden states, and the keys and values to continue from.

Inference only. Parameter names are those of transformers' Gemma2Model, so a published checkpoint loads strictly and
unchanged. It does without transformers, whose import takes longer than the rest of a start. Source: Gemma 2 (arXiv
2408.00118); transformers models/gemma2/modeling_gemma2.py.

Shapes: B prompts, L tokens to run, P tokens before them, S = P + L, D hidden size, H query heads and K key heads of d.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keys and values of a layer's past tokens, [B, K, P, d] each.
Past = tuple[Tensor, Tensor]

_LAYER_TYPES = ("sliding_attention", "full_attention")
# Keys of config.json with one supported value, which every Gemma-2 has.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("gemma2",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
}


@dataclass(frozen=True)
class GemmaConfig:
    """Configuration, named as in config.json; defaults are those of transformers, Gemma-2 2B."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    layer_types: tuple[str, ...] = ()  # empty: sliding and full in turn

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", tuple(islice(cycle(_LAYER_TYPES), self.num_hidden_layers)))
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(_LAYER_TYPES):
            raise ValueError(
                f"layer_types: got {self.layer_types}, needed are {self.num_hidden_layers} of {_LAYER_TYPES}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, needed is a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "GemmaConfig":
        """Reads text_encoder/config.json; ignores keys of other tasks (generation, training).

        Raises ValueError with the key, for another model than Gemma-2 or an unsupported value.
        """
        if "model_type" not in config:
            raise ValueError("model_type: got nothing, supported: 'gemma2'")
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", cls.rope_theta)}
        if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters: got {rope!r}, supported: rope_type 'default'")
        values = {**config, "rope_theta": rope.get("rope_theta", cls.rope_theta)}
        for key, allowed in _FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key}: got {values[key]!r}, supported: {allowed[0]!r}")
        known: dict[str, object] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for key, value in known.items():
            like = getattr(cls, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            if isinstance(like, int | float) and not number and (value, key) != (None, "attn_logit_softcapping"):
                raise ValueError(f"{key}: got {value!r}, needed is a positive number like {like!r}")
        kinds = known.pop("layer_types", None) or ()
        if not isinstance(kinds, Sequence):
            raise ValueError(f"layer_types: got {kinds!r}, needed is a list of {_LAYER_TYPES}")
        return cls(layer_types=tuple(kinds), **known)  # type: ignore[arg-type]  # checked above


class Norm(nn.Module):
    """Computes x / rms(x) * (1 + weight) in fp32; returns the type of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class Attention(nn.Module):
    """Softmax attention with capped logits; each key head serves H/K query heads."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.head_dim, self.key_heads = config.head_dim, config.num_key_value_heads
        self.scale, self.cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Returns [B, L, D] and the past of all S tokens. x [B, L, D]; rotary: cosines, sines [L, d]; bias [L, S]."""
        query = rotated(self._heads(self.q_proj(x)), *rotary)
        key, value = rotated(self._heads(self.k_proj(x)), *rotary), self._heads(self.v_proj(x))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        grouped = torch.unflatten(query, 1, (self.key_heads, -1)).flatten(2, 3)  # [B, K, H/K*L, d]
        scores = (grouped @ key.transpose(2, 3)) * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        scores = torch.unflatten(scores, 2, (-1, bias.shape[0])) + bias  # [B, K, H/K, L, S]
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = (weights.flatten(2, 3) @ value).view(query.shape)  # [B, H, L, d]
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out, (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        """Views [B, L, heads*d] as [B, heads, L, d]."""
        return torch.unflatten(x, 2, (-1, self.head_dim)).transpose(1, 2)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates x [..., L, d] by the angles of its positions; the halves of d are the planes' two axes."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class GatedMLP(nn.Module):
    """GELU (tanh form) of one linear map times another, and back."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then MLP; each between two norms and added to its input."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        attended, states = self.self_attn(self.input_layernorm(x), rotary, bias, past)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), states


class GemmaBody(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, past: Sequence[Past] | None = None) -> tuple[Tensor, list[Past]]:
        """Returns hidden states [B, L, D] of ids [B, L] after the P tokens of `past`, and each layer's new past."""
        start = 0 if past is None else past[0][0].shape[2]
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # rounded as upstream rounds it
        total = start + ids.shape[1]
        position = torch.arange(start, total, device=ids.device)
        rotary, biases = self._rotary(position, x.dtype), self._biases(position, total, x.dtype)
        pasts = []
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            x, states = layer(x, rotary, biases[kind], None if past is None else past[index])
            pasts.append(states)
        return self.norm(x), pasts

    def _rotary(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [L, d] of the angles of `position` [L], computed in fp32."""
        dim = self.config.head_dim
        even = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device)
        angle = position[:, None].float() * (1.0 / self.config.rope_theta ** (even / dim))
        angle = torch.cat([angle, angle], dim=1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _biases(self, position: Tensor, total: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns a mask bias [L, S] per layer type; it hides later tokens and those outside of the window."""
        distance = position[:, None] - torch.arange(total, device=position.device)
        hidden = {"full_attention": distance < 0}
        hidden["sliding_attention"] = hidden["full_attention"] | (distance >= self.config.sliding_window)
        blank = torch.zeros(distance.shape, dtype=dtype, device=position.device)
        return {kind: blank.masked_fill(hide, torch.finfo(dtype).min) for kind, hide in hidden.items()}
