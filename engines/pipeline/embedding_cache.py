"""Embeddings of prompts that came before."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """What the transformer reads of one prompt."""

    states: Tensor  # [T, D], without padding
    truncated: bool
    cached: bool


class EmbeddingCache:
    """Least recently used embeddings by prompt text, bounded in entries and in bytes; hits and misses are counted."""

    def __init__(self, max_entries: int = 4096, max_bytes: int = 128 * 2**20):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.hits = self.misses = self.bytes = 0
        self._kept: OrderedDict[str, TextEmbedding] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, text: str) -> TextEmbedding | None:
        found = self._kept.get(text)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(text)
        return found

    def put(self, text: str, embedding: TextEmbedding) -> None:
        """Keeps a copy of `embedding` that shares no memory with the batch it came from."""
        self._drop(text)
        kept = TextEmbedding(embedding.states.clone(), embedding.truncated, cached=True)
        self._kept[text] = kept
        self.bytes += kept.states.nbytes
        while len(self._kept) > self.max_entries or self.bytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, text: str) -> None:
        dropped = self._kept.pop(text, None)
        if dropped is not None:
            self.bytes -= dropped.states.nbytes
