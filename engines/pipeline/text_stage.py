"""The text stage: from prompts to the transformer's text input, with a cache of embeddings.

It tokenises and encodes the prompts that the cache lacks, each once, in one batch.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engines.backends.cpu.kernels.checked import load_library
from engines.backends.cpu.kernels.few_rows import replace_linears
from engines.backends.cuda.graphs import GraphCapture
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.fingerprint import equal_text_encoders
from engines.checkpoints.prefix_cache import PrefixCache
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import PrefixState, TextEncoder, Tokens
from engines.pipeline.lru_cache import LruCache
from engines.pipeline.prompt_tokenizer import PromptTokenizer

CACHE_BYTES = 128 * 2**20
SLOW_PREFIX_S = 1.0  # Gemma-2 2B needs 1.1e12 operations for 270 tokens: milliseconds of a GPU


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """The transformer's text input for one prompt. `cached`: nothing ran for it."""

    states: Tensor  # [T, D], without padding
    truncated: bool
    cached: bool


class Encoder(Protocol):
    """engines.models.text_encoder.TextEncoder or its replacement by a backend."""

    @property
    def prefix(self) -> tuple[int, ...]: ...

    def encode(self, prompts: Sequence[Tokens]) -> list[Tensor]: ...


@runtime_checkable
class Captures(Protocol):
    """An encoder that runs as CUDA graphs. `warm` runs what it captures."""

    def warm(self) -> None: ...

    def capture(self, recorder: GraphCapture) -> str | None: ...


class TextStage:
    """Tokenizer, encoder and a cache of embeddings by prompt, bounded in bytes and entries."""

    def __init__(self, tokenizer: PromptTokenizer, encoder: Encoder, max_cached: int = 4096):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.cache: LruCache[str, TextEmbedding] = LruCache(lambda one: one.states.nbytes, CACHE_BYTES, max_cached)
        self._captured = False
        self._failure: str | None = None

    def capture(self, recorder: GraphCapture) -> str | None:
        """Captures the graphs of an encoder that has them; once, even if several engines share this stage.

        Otherwise runs all lengths, so that no request waits for its kernels. Returns the reason if a graph could not be
        captured.
        """
        if self._captured:
            return self._failure
        self._captured = True
        if isinstance(self.encoder, Captures):
            self._failure = self.encoder.capture(recorder)
        else:
            self.run_all_lengths()
        return self._failure

    @torch.inference_mode()
    def run_all_lengths(self) -> None:
        """Runs the encoder once for each of its graphs; without graphs, at each power of two of lengths."""
        if isinstance(self.encoder, Captures):
            self.encoder.warm()
            return
        prefix, length = self.encoder.prefix, 1
        while length < self.tokenizer.max_tokens:
            self.encoder.encode([Tokens((*prefix, *prefix[-1:] * length), len(prefix))])
            length *= 2

    def encode(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns one embedding per prompt, in order."""
        texts = [self.tokenizer.normalise(prompt) for prompt in prompts]
        embeddings: dict[str, TextEmbedding] = {}
        missing = []
        for text in dict.fromkeys(texts):
            cached = self.cache.get(text)
            if cached is None:
                missing.append(self.tokenizer.encode(text))
            else:
                embeddings[text] = cached
        encoded = self.encoder.encode([prompt.tokens for prompt in missing]) if missing else []
        for prompt, states in zip(missing, encoded, strict=True):
            embeddings[prompt.text] = TextEmbedding(states, prompt.truncated, cached=False)
            # A clone, so that an entry does not keep the memory of its batch.
            self.cache.put(prompt.text, TextEmbedding(states.clone(), prompt.truncated, cached=True))
        return [embeddings[text] for text in texts]


def load_text_stage(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, cache: Path | None = None
) -> TextStage:
    """Loads the text stage of a checkpoint, without embeddings. Raises CheckpointError.

    cache: folder in which a CPU keeps the instruction's keys and values if they took longer than SLOW_PREFIX_S, and
    compiled kernels in C, which then compute its products in bf16.
    """
    settings = checkpoint.settings
    instruction = INSTRUCTION if settings.instruction else ""
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), instruction, settings.max_prompt_tokens)
    body = checkpoint.load_text_body(dtype, device)
    kept = PrefixCache.of(checkpoint.weights, tokenizer.prefix, dtype, cache) if device.type == "cpu" else None
    state = None if kept is None else kept.read()
    if device.type == "meta":
        state = PrefixState.blank(body, len(tokenizer.prefix))
    if cache is not None and device.type == "cpu" and dtype == torch.bfloat16:
        library = load_library(cache)
        if library is not None:
            replace_linears(body, library)
    began = time.perf_counter()
    encoder = TextEncoder(body, tokenizer.prefix, state)
    if kept is not None and state is None and time.perf_counter() - began > SLOW_PREFIX_S:
        kept.write(encoder.state)
    return TextStage(tokenizer, encoder)


@dataclass(frozen=True)
class _Loaded:
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    stage: TextStage


class TextStages:
    """The text stages of engines that one thread calls: equal ones are loaded once, and share their cache.

    Holds every stage until the end, as the engines that share it do.
    """

    def __init__(self) -> None:
        self._loaded: list[_Loaded] = []
        self._converted: dict[TextStage, TextStage] = {}
        self._guard = threading.Lock()

    def load(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, cache: Path | None = None
    ) -> TextStage:
        """Returns the stage of an equal text encoder in this dtype on this device, or loads it (load_text_stage).

        Equal is what engines.checkpoints.fingerprint says, whatever the path.
        """
        with self._guard:
            stage = self._find(checkpoint, dtype, device)
            if stage is None:
                stage = load_text_stage(checkpoint, dtype, device, cache)
                self._loaded.append(_Loaded(checkpoint, dtype, device, stage))
            return stage

    def adopt(
        self,
        own: TextStage,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        convert: Callable[[TextStage], TextStage],
    ) -> TextStage:
        """Returns the converted stage of an equal text encoder in place of `own`, the converted one of this engine."""
        with self._guard:
            stage = self._find(checkpoint, dtype, device)
            if stage is not None:
                return self.converted(stage, convert)
            self._loaded.append(_Loaded(checkpoint, dtype, device, own))
            return self.converted(own, lambda same: same)

    def _find(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> TextStage | None:
        for one in self._loaded:
            if (one.dtype, one.device) == (dtype, device) and equal_text_encoders(one.checkpoint, checkpoint):
                return one.stage
        return None

    def converted(self, stage: TextStage, convert: Callable[[TextStage], TextStage]) -> TextStage:
        """Returns what `convert` made of this stage the first time: a backend lays its weights out once."""
        if stage not in self._converted:
            self._converted[stage] = convert(stage)
        return self._converted[stage]


def pad(embeddings: Sequence[TextEmbedding], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns states [B, tokens, D] in `dtype`, padded with zeros, and their mask [B, tokens] on the host."""
    states = [embedding.states for embedding in embeddings]
    padded = states[0].new_zeros(len(states), tokens, states[0].shape[1], dtype=dtype)
    for row, embedding in zip(padded, states, strict=True):
        row[: embedding.shape[0]] = embedding
    return padded, torch.arange(tokens) < torch.tensor([len(embedding) for embedding in states])[:, None]


def join(embeddings: Sequence[TextEmbedding]) -> tuple[Tensor, Tensor | None]:
    """Returns states [B, T, D] padded to the longest, and a mask [B, T] if lengths differ, else None."""
    lengths = [embedding.states.shape[0] for embedding in embeddings]
    states = torch.nn.utils.rnn.pad_sequence([embedding.states for embedding in embeddings], batch_first=True)
    if min(lengths) == max(lengths):
        return states, None
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return states, mask.to(states.device)
