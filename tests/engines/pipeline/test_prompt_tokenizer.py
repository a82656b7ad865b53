"""A prompt is encoded with the end of the instruction alone, and gets the tokens that it has behind all of it."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from engines.pipeline.prompt_tokenizer import PromptTokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
INSTRUCTION = "Draw what the prompt says.\nUser Prompt: "
TEXTS = [INSTRUCTION + text for text in ("a red circle", "a cat: a hat", "<red>", "two cats, three hats")]
LIMIT = 12


def gemma_like(*, joined: bool = False, texts: list[str] = TEXTS) -> Tokenizer:
    """Returns BPE of the whole text with spaces replaced. joined: tokens may hold a space in their middle."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if not joined:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        texts * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=SPECIAL)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


class Recording:
    """A tokenizer that keeps the texts that it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def encode(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def prompts() -> list[str]:
    rng = random.Random(7)
    pieces = [
        "a",
        " red",
        " circle",
        ":",
        "▁",
        " ",
        "  ",
        ",",
        "\n",
        "cat",
        "<bos>",
        "<eos>",
        "é",
        "漢",
        "user prompt: ",
    ]
    return ["", " ", "a red circle", *("".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(300))]


def encoded_behind(tokenizer: Tokenizer, instruction: str = INSTRUCTION) -> str:
    """Returns what is encoded for the empty prompt, once all prompts were found to have the right tokens."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    longest = len(whole.encode(instruction).ids) + LIMIT - 2
    whole.enable_truncation(longest)
    recording = Recording(tokenizer)
    ours = PromptTokenizer(recording, instruction, LIMIT)  # type: ignore[arg-type]
    cut = 0
    for prompt in prompts():
        expected = whole.encode(instruction + prompt.lower().strip())
        found = ours.encode(prompt)
        assert found.tokens.ids == tuple(expected.ids), prompt
        assert found.truncated == bool(expected.overflowing)
        cut += found.truncated
    assert 0 < cut < 300
    ours.encode("")
    return recording.texts[-1]


def test_only_the_space_before_the_prompt_is_encoded_again() -> None:
    assert encoded_behind(gemma_like()) == " "


def test_a_token_that_may_span_the_border_moves_it() -> None:
    spanning = gemma_like(joined=True)
    assert any(":▁" in token for token in spanning.get_vocab())
    tail = encoded_behind(spanning)
    assert len(tail) > 1
    assert INSTRUCTION.endswith(tail)


@pytest.mark.parametrize("content", [": ", ":▁", "t: a"])
def test_an_added_token_may_span_the_border_too(content: str) -> None:
    tokenizer = gemma_like()
    tokenizer.add_tokens([AddedToken(content, normalized=False)])
    assert len(encoded_behind(tokenizer)) > 1


def _added(**flags: bool) -> Tokenizer:
    tokenizer = gemma_like()
    tokenizer.add_tokens([AddedToken("red", normalized=False, **flags)])
    return tokenizer


def _ending(tokenizer: Tokenizer) -> Tokenizer:
    special = [("<bos>", 2), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return tokenizer


def _normalised(normalizer: Any) -> Tokenizer:
    tokenizer = gemma_like()
    tokenizer.normalizer = normalizer
    return tokenizer


def _split(splitter: Any) -> Tokenizer:
    tokenizer = gemma_like()
    tokenizer.pre_tokenizer = splitter
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(_added(lstrip=True), id="an added token that takes spaces on its left"),
        pytest.param(_added(single_word=True), id="an added token that looks beside itself"),
        pytest.param(_ending(gemma_like()), id="a token behind the text"),
        pytest.param(_normalised(None), id="no normaliser"),
        pytest.param(_normalised(normalizers.NFKC()), id="another normaliser"),
        pytest.param(_split(pre_tokenizers.Whitespace()), id="words"),
        pytest.param(_split(pre_tokenizers.Split("▁", "isolated")), id="another splitting"),
    ],
)
def test_another_kind_of_tokenizer_encodes_all(tokenizer: Tokenizer) -> None:
    assert encoded_behind(tokenizer) == INSTRUCTION
