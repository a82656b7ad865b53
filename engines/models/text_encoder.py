"""Gemma-2 as Sprint's text encoder: token ids in, the hidden states that the transformer attends to out.

Gemma is causal and every prompt follows the same instruction, so the instruction's keys and values are computed once
and only the prompt's own tokens are run; right padding in a batch cannot reach real tokens. Equal to running all of it,
padded and masked, as diffusers does (pipelines/sana/pipeline_sana_sprint.py). Knows no text.

Shapes: B prompts, P prefix tokens, T tokens of a prompt that are kept, D hidden size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Tokens:
    """All ids of a prompt, instruction included. The hidden states kept are the first's and those from `start` on."""

    ids: tuple[int, ...]
    start: int


def gemma_body(config: Mapping[str, Any]) -> nn.Module:
    """transformers' Gemma2Model (no language head) with parameters on the meta device, to be loaded.

    config: text_encoder/config.json. Attention is eager, because its logits are soft-capped, which the fused kernels
    do not know. Raises ValueError where the config is not one of Gemma-2.
    """
    if config.get("model_type") != "gemma2":
        raise ValueError(f"model_type: got {config.get('model_type')!r}, supported: 'gemma2'")
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model, Gemma2RotaryEmbedding

    parsed = Gemma2Config.from_dict(dict(config), attn_implementation="eager")
    with torch.device("meta"):
        body: nn.Module = Gemma2Model(parsed)
    body.rotary_emb = Gemma2RotaryEmbedding(parsed)  # buffers that no checkpoint holds
    embed = body.get_submodule("embed_tokens")
    embed.register_buffer("embed_scale", torch.tensor(float(parsed.hidden_size) ** 0.5), persistent=False)
    return body


class TextEncoder:
    """A loaded Gemma-2 body together with the keys and values of the prefix that prompts share.

    prefix: ids that begin (nearly) all prompts, at least one; a prompt that departs from it earlier is still exact,
    and reuses what it shares.
    """

    @torch.inference_mode()
    def __init__(self, body: nn.Module, prefix: Sequence[int]):
        from transformers.cache_utils import DynamicCache

        self.body: Any = body.eval().requires_grad_(False)  # a Gemma2Model, which is imported in functions only
        weight = next(body.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self.prefix = tuple(prefix)
        cache: Any = DynamicCache()
        hidden = self._run(torch.tensor([self.prefix], device=self._device), 0, cache)
        self._first = hidden[0, :1]  # [1, D]: the first token sees itself alone, so it is the same for all prompts
        self._prefix_states = [(layer.keys, layer.values) for layer in cache.layers]  # [1, heads, P, head_dim] each

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Tokens]) -> list[Tensor]:
        """The kept hidden states of each prompt: [T, D], T differing."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[self._shared(prompt)].append(index)
        kept: dict[int, Tensor] = {}
        for shared, members in groups.items():
            for index, hidden in zip(members, self._encode_after(shared, [prompts[i] for i in members]), strict=True):
                kept[index] = torch.cat([self._first, hidden[prompts[index].start - shared :]])
        return [kept[index] for index in range(len(prompts))]

    def _shared(self, prompt: Tokens) -> int:
        """How many leading tokens the prompt has in common with the prefix and need not be run."""
        shared = 0
        for mine, prefix in zip(prompt.ids[: prompt.start], self.prefix, strict=False):
            if mine != prefix:
                break
            shared += 1
        return shared

    def _encode_after(self, shared: int, prompts: Sequence[Tokens]) -> list[Tensor]:
        """Hidden states of the tokens behind the `shared` ones, per prompt."""
        from transformers.cache_utils import DynamicCache

        lengths = [len(prompt.ids) - shared for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt.ids[shared:], dtype=torch.long)
        if not ids.shape[1]:
            return [self._first[:0]] * len(prompts)
        states = [
            tuple(state[:, :, :shared].expand(len(prompts), -1, -1, -1) for state in layer)
            for layer in self._prefix_states
        ]
        hidden = self._run(ids.to(self._device), shared, DynamicCache(states))
        return [hidden[row, :length] for row, length in enumerate(lengths)]

    def _run(self, ids: Tensor, past: int, cache: Any) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L] that follow `past` tokens held in `cache`, which grows by them."""
        length = ids.shape[1]
        query = torch.arange(past, past + length, device=ids.device)
        key = torch.arange(past + length, device=ids.device)
        distance = query[:, None] - key  # [L, past + L]
        window = self.body.config.sliding_window
        masks = {"full_attention": distance < 0, "sliding_attention": (distance < 0) | (distance >= window)}
        bias = {
            kind: torch.zeros_like(hide, dtype=self._dtype).masked_fill(hide, torch.finfo(self._dtype).min)[None, None]
            for kind, hide in masks.items()
        }
        output = self.body(ids, attention_mask=bias, position_ids=query[None], past_key_values=cache)
        hidden: Tensor = output.last_hidden_state
        return hidden
