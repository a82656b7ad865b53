"""The text stage: its cache of embeddings, and the batch of texts of different lengths."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines.artifacts.native.skeleton import ShapesOnly
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.models.gemma import GemmaBody
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import TextEncoder
from engines.pipeline.lru_cache import LruCache
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.pipeline.text_stage import TextEmbedding, TextStage, TextStages, join, load_text_stage


@pytest.fixture
def stage(folder: Path) -> TextStage:
    checkpoint = open_checkpoint(str(folder))
    tokenizer = PromptTokenizer(checkpoint.load_tokenizer(), INSTRUCTION, 300)
    body = checkpoint.load_text_body(torch.float32, torch.device("cpu"))
    return TextStage(tokenizer, TextEncoder(body, tokenizer.prefix), max_cached=3)


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


def test_the_least_recently_used_prompt_is_dropped(stage: TextStage) -> None:
    for prompt in ("one", "two", "three", "one", "four"):
        stage.encode([prompt])
    assert [stage.encode([prompt])[0].cached for prompt in ("one", "three", "four")] == [True, True, True]
    assert not stage.encode(["two"])[0].cached
    assert len(stage.cache) == 3


def test_bytes_are_bounded_and_counted() -> None:
    cache: LruCache[str, bytes] = LruCache(len, max_bytes=1000, max_entries=100)
    for index in range(10):
        cache.put(str(index), bytes(320))
    assert (len(cache), cache.bytes) == (3, 960)
    cache.put("9", bytes(32))
    assert (len(cache), cache.bytes) == (3, 672)
    cache.put("large", bytes(3200))
    assert (len(cache), cache.bytes) == (0, 0)


def test_an_entry_does_not_keep_the_memory_of_its_batch(stage: TextStage) -> None:
    stage.encode(["a cat", "three green triangles on a white background"])
    cached = stage.cache.get("a cat")
    assert cached is not None
    assert cached.states.untyped_storage().nbytes() == cached.states.nbytes


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


def test_stages_of_equal_encoders_are_one_and_converted_once(folder: Path, tmp_path: Path) -> None:
    """Equal by content: a copy elsewhere is the same one; another instruction, type or weight is not."""
    checkpoint = open_checkpoint(str(folder))
    copy = open_checkpoint(str(shutil.copytree(folder, tmp_path / "copy")))
    stages, cpu = TextStages(), torch.device("cpu")
    first = stages.load(checkpoint, torch.float32, cpu)
    assert stages.load(copy, torch.float32, cpu) is first
    assert stages.load(copy, torch.bfloat16, cpu) is not first
    without = replace(copy, settings=replace(copy.settings, instruction=False))
    assert stages.load(without, torch.float32, cpu) is not first
    [path] = (tmp_path / "copy/text_encoder").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = open_checkpoint(str(tmp_path / "copy"))
    assert stages.load(changed, torch.float32, cpu) is not first

    def convert(stage: TextStage) -> TextStage:
        return TextStage(stage.tokenizer, stage.encoder)

    converted = stages.converted(first, convert)
    assert converted is not first
    assert stages.converted(first, convert) is converted


def test_an_engine_with_its_own_layout_drops_it_for_an_equal_one(folder: Path) -> None:
    """Whichever of two engines loads first, both then run one stage, converted once."""
    checkpoint, cpu = open_checkpoint(str(folder)), torch.device("cpu")
    own, other = (load_text_stage(checkpoint, torch.float32, cpu) for _ in range(2))
    converted: list[TextStage] = []

    def convert(stage: TextStage) -> TextStage:
        converted.append(stage)
        return TextStage(stage.tokenizer, stage.encoder)

    stages = TextStages()
    assert stages.adopt(own, checkpoint, torch.float32, cpu, convert) is own
    assert stages.adopt(other, checkpoint, torch.float32, cpu, convert) is own
    assert stages.converted(stages.load(checkpoint, torch.float32, cpu), convert) is own
    assert converted == []
    stages = TextStages()
    loaded = stages.load(checkpoint, torch.float32, cpu)
    adopted = stages.adopt(own, checkpoint, torch.float32, cpu, convert)
    assert adopted not in (own, loaded)
    assert stages.converted(loaded, convert) is adopted
    assert converted == [loaded]


def test_a_stage_without_values_has_the_state_of_its_prefix_and_runs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device a run would import torch's compiler: seconds of the start of a native engine."""

    def parts(checkpoint: Checkpoint, device: str) -> list[tuple[torch.Size, torch.dtype, str]]:
        stage = load_text_stage(checkpoint, torch.bfloat16, torch.device(device))
        assert isinstance(stage.encoder, TextEncoder)
        state = stage.encoder.state
        tensors = (state.first, *(one for past in state.past for one in past))
        return [(one.shape, one.dtype, one.device.type) for one in tensors]

    checkpoint = open_checkpoint(str(folder))
    expected = parts(checkpoint, "cpu")
    monkeypatch.setattr(GemmaBody, "forward", None)
    blank = parts(replace(checkpoint, weights=ShapesOnly(checkpoint.weights)), "meta")
    assert blank == [(shape, dtype, "meta") for shape, dtype, _ in expected]
