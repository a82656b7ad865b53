"""Gemma-2 as Sprint's text encoder: token ids to the hidden states that the transformer attends to.

Gemma is causal and every prompt follows the same instruction. So the instruction's keys and values are computed once,
and only the prompt's own tokens run. Right padding in a batch cannot affect real tokens. The result equals diffusers',
which runs everything, padded and masked (pipelines/sana/pipeline_sana_sprint.py).

Shapes: B prompts, P prefix tokens, T tokens of a prompt that the transformer reads, D hidden size.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.models.gemma import GemmaBody, Past


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids of a prompt with its instruction. The transformer reads the first hidden state and those from `start` on."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class PrefixState:
    """The hidden state of a prefix's first token, and each layer's keys and values of the prefix."""

    first: Tensor  # [1, D]
    past: Sequence[Past]

    @classmethod
    def blank(cls, body: GemmaBody, length: int) -> "PrefixState":
        """Returns the state of `length` tokens without values, for a body on the meta device.

        To run the body there imports torch's compiler and takes seconds.
        """
        config, like = body.config, body.embed_tokens.weight
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        past = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.num_hidden_layers)]
        return cls(like.new_empty(1, config.hidden_size), past)


class TextEncoder:
    """Encodes prompts with a loaded Gemma-2 body and the keys and values of their shared prefix.

    prefix: first ids of nearly all prompts, at least one. A prompt that differs earlier is still exact and reuses the
    part that it shares. state: that of this prefix by this body; None computes it.
    """

    @torch.inference_mode()
    def __init__(self, body: GemmaBody, prefix: Sequence[int], state: PrefixState | None = None):
        self.body = body.eval().requires_grad_(False)
        self._device = body.embed_tokens.weight.device
        self.prefix = tuple(prefix)
        if state is None:
            hidden, past = body(torch.tensor([self.prefix], device=self._device))
            state = PrefixState(hidden[0, :1], past)
        # The first token attends only to itself, so it is the same for all prompts.
        self.state, self._first, self._past = state, state.first, state.past

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Tokens]) -> list[Tensor]:
        """Returns the hidden states of each prompt that the transformer reads: [T, D], T differing."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[self._shared(prompt)].append(index)
        states: dict[int, Tensor] = {}
        for shared, members in groups.items():
            for index, hidden in zip(members, self._encode_after(shared, [prompts[i] for i in members]), strict=True):
                states[index] = torch.cat([self._first, hidden[prompts[index].start - shared :]])
        return [states[index] for index in range(len(prompts))]

    def _shared(self, prompt: Tokens) -> int:
        """Counts the leading tokens that the prompt shares with the prefix, which need not run."""
        shared = 0
        for own, prefix in zip(prompt.ids[: prompt.start], self.prefix, strict=False):
            if own != prefix:
                break
            shared += 1
        return shared

    def _encode_after(self, shared: int, prompts: Sequence[Tokens]) -> list[Tensor]:
        """Returns each prompt's hidden states after the `shared` tokens."""
        lengths = [len(prompt.ids) - shared for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt.ids[shared:], dtype=torch.long)
        if not ids.shape[1]:
            return [self._first[:0]] * len(prompts)
        past: list[Past] = [
            (key[:, :, :shared].expand(len(prompts), -1, -1, -1), value[:, :, :shared].expand(len(prompts), -1, -1, -1))
            for key, value in self._past
        ]
        hidden, _ = self.body(ids.to(self._device), past)
        return [hidden[row, :length] for row, length in enumerate(lengths)]
