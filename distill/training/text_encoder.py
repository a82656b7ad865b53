"""Text encoding of a tiny checkpoint: a word-level tokenizer and a small Gemma-2, both in upstream's file layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma2 import Gemma2Config, Gemma2Model

from distill.recipes import TextEncoderConfig

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as Gemma's

# Captions to the transformer's text input: states [B,T,W] and mask [B,T] (1 keeps), both without gradients.
Captioner = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [B,T] and mask [B,T] (1 keeps)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class SmallCaptioner:
    """The tiny recipes' captioner: a word-level tokenizer and a small Gemma-2."""

    encoder: Gemma2Model
    tokenizer: PreTrainedTokenizerFast
    max_tokens: int

    def tokens(self, captions: Sequence[str]) -> TokenBatch:
        return tokenize(self.tokenizer, captions, self.max_tokens).to(self.encoder.device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(captions)
        return self.encoder(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state, tokens.mask


def make_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per word that ignores case and punctuation; <bos> in front, padding right."""
    tokens = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary))}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Steps([Punctuation("removed"), WhitespaceSplit()])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokens["<bos>"])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped in transformers
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=max_tokens,
        padding_side="right",
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], max_tokens: int) -> TokenBatch:
    """Pads to max_tokens. Raises ValueError for a longer caption, because training must not truncate."""
    batch = tokenizer(list(captions), padding="max_length", max_length=max_tokens, return_tensors="pt")
    ids = batch["input_ids"]
    if ids.shape[1] != max_tokens:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, allowed are {max_tokens}: {max(captions, key=len)!r}")
    return TokenBatch(ids, batch["attention_mask"])


def make_encoder(size: TextEncoderConfig, vocabulary_size: int) -> Gemma2Model:
    """Makes an untrained Gemma-2 body of the recipe's size (soft-capping needs eager attention)."""
    config = Gemma2Config(
        vocab_size=vocabulary_size,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        head_dim=size.width // size.heads,
        query_pre_attn_scalar=size.width // size.heads,
        max_position_embeddings=128,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        use_cache=False,
        attn_implementation="eager",  # type: ignore[call-arg]  # read by the base class
    )
    return Gemma2Model(config)
