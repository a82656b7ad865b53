"""The text stage: prompts in, the transformer's text input out, with embeddings kept by prompt.

Only prompts that are not in the cache are tokenised and run, each once, in one batch.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engines.backends.cuda.graphs import GraphCapture
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import TextEncoder, Tokens
from engines.pipeline.embedding_cache import EmbeddingCache, TextEmbedding
from engines.pipeline.prompt_tokenizer import PromptTokenizer


class Encoder(Protocol):
    """engines.models.text_encoder.TextEncoder, or what a backend has in its place."""

    @property
    def prefix(self) -> tuple[int, ...]: ...

    def encode(self, prompts: Sequence[Tokens]) -> list[Tensor]: ...


@runtime_checkable
class Captures(Protocol):
    """An encoder that runs as CUDA graphs."""

    def capture(self, recorder: GraphCapture) -> None: ...


class TextStage:
    """Tokenizer, encoder and cache together."""

    def __init__(self, tokenizer: PromptTokenizer, encoder: Encoder, cache: EmbeddingCache):
        self.tokenizer, self.encoder, self.cache = tokenizer, encoder, cache

    def capture(self, recorder: GraphCapture) -> None:
        """Has the encoder's graphs captured, where it has any; without, runs it once at each power of two of lengths,
        so that no request pays for loading kernels."""
        if isinstance(self.encoder, Captures):
            self.encoder.capture(recorder)
            return
        prefix, length = self.encoder.prefix, 1
        while length < self.tokenizer.max_tokens:
            self.encoder.encode([Tokens((*prefix, *prefix[-1:] * length), len(prefix))])
            length *= 2

    def encode(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """One embedding per prompt, in order. `cached` says that nothing was run for that prompt."""
        texts = [self.tokenizer.normalise(prompt) for prompt in prompts]
        found: dict[str, TextEmbedding] = {}
        missing = []
        for text in dict.fromkeys(texts):
            hit = self.cache.get(text)
            if hit is None:
                missing.append(self.tokenizer.encode(text))
            else:
                found[text] = hit
        encoded = self.encoder.encode([prompt.tokens for prompt in missing]) if missing else []
        for prompt, states in zip(missing, encoded, strict=True):
            found[prompt.text] = TextEmbedding(states, prompt.truncated, cached=False)
            self.cache.put(prompt.text, found[prompt.text])
        return [found[text] for text in texts]


def load_text_stage(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> TextStage:
    """The text stage of a checkpoint, with an empty cache. Raises CheckpointError."""
    settings = checkpoint.settings
    instruction = INSTRUCTION if settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
    encoder = TextEncoder(checkpoint.load_text_body(dtype, device), tokenizer.prefix)
    return TextStage(tokenizer, encoder, EmbeddingCache())


def join(embeddings: Sequence[TextEmbedding]) -> tuple[Tensor, Tensor | None]:
    """One batch of texts: states [B, T, D] padded to the longest, and a mask [B, T] where lengths differ, else None."""
    lengths = [embedding.states.shape[0] for embedding in embeddings]
    states = torch.nn.utils.rnn.pad_sequence([embedding.states for embedding in embeddings], batch_first=True)
    if min(lengths) == max(lengths):
        return states, None
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return states, mask.to(states.device)
