"""The cache of embeddings and the joining of texts into one batch."""

from pathlib import Path

import pytest
import torch

from engines.checkpoints.checkpoint import open_checkpoint
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import TextEncoder
from engines.pipeline.embedding_cache import EmbeddingCache, TextEmbedding
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.pipeline.text_stage import TextStage, join


@pytest.fixture
def stage(folder: Path) -> TextStage:
    checkpoint = open_checkpoint(str(folder))
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), INSTRUCTION, 300)
    body = checkpoint.load_text_body(torch.float32, torch.device("cpu"))
    return TextStage(tokenizer, TextEncoder(body, tokenizer.prefix), EmbeddingCache(max_entries=3))


def test_a_prompt_is_run_once(stage: TextStage) -> None:
    runs = []
    stage.encoder.body.register_forward_hook(lambda _, given, __: runs.append(given[0].shape[0]))
    first = stage.encode(["a cat", "a dog", "A cat "])
    assert [embedding.cached for embedding in first] == [False, False, False]
    again = stage.encode(["a dog", "a cat", "a bird"])
    assert [embedding.cached for embedding in again] == [True, True, False]
    assert torch.equal(again[1].states, first[0].states)
    assert torch.equal(first[2].states, first[0].states)
    assert runs == [2, 1]
    assert (stage.cache.hits, stage.cache.misses) == (2, 3)


def test_the_least_recently_used_prompt_is_dropped(stage: TextStage) -> None:
    for prompt in ("one", "two", "three", "one", "four"):
        stage.encode([prompt])
    assert [stage.encode([prompt])[0].cached for prompt in ("one", "three", "four")] == [True, True, True]
    assert not stage.encode(["two"])[0].cached
    assert len(stage.cache) == 3


def test_bytes_are_bounded_and_counted() -> None:
    cache = EmbeddingCache(max_entries=100, max_bytes=1000)
    for index in range(10):
        cache.put(str(index), TextEmbedding(torch.zeros(10, 8), truncated=False, cached=False))  # 320 bytes
    assert (len(cache), cache.bytes) == (3, 960)
    cache.put("9", TextEmbedding(torch.zeros(1, 8), truncated=True, cached=False))
    assert (len(cache), cache.bytes) == (3, 672)
    cache.put("large", TextEmbedding(torch.zeros(100, 8), truncated=False, cached=False))
    assert (len(cache), cache.bytes) == (0, 0)


def test_an_entry_does_not_hold_its_batch_alive() -> None:
    cache = EmbeddingCache()
    batch = torch.zeros(8, 100, 16)
    cache.put("row", TextEmbedding(batch[0, :5], truncated=False, cached=False))
    kept = cache.get("row")
    assert kept is not None
    assert kept.states.untyped_storage().nbytes() == 5 * 16 * 4


def test_a_mask_is_made_only_where_lengths_differ() -> None:
    def of(length: int) -> TextEmbedding:
        return TextEmbedding(torch.full((length, 4), float(length)), truncated=False, cached=False)

    states, mask = join([of(3), of(3)])
    assert states.shape == (2, 3, 4)
    assert mask is None
    states, mask = join([of(2), of(5)])
    assert states.shape == (2, 5, 4)
    assert mask is not None
    assert mask.tolist() == [[True, True, False, False, False], [True] * 5]
