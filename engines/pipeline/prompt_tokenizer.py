"""Turns prompts into token ids: adds the instruction and truncates. Knows no tensors.

Follows diffusers token for token (pipelines/sana/pipeline_sana_sprint.py, encode_prompt). It lower-cases and strips the
prompt, puts an instruction before it, and truncates to the instruction's length plus `max_tokens` - 2. Of the hidden
states it uses the first and the last `max_tokens` - 1 positions. It never pads, while upstream masks padding.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from engines.errors import CheckpointError
from engines.models.text_encoder import Tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt. Prompts of equal `text` have equal embeddings."""

    text: str
    tokens: Tokens
    truncated: bool


class PromptTokenizer:
    """Turns prompts into token ids, with one instruction (or none) and one limit.

    `prefix` holds the first ids of every prompt: those of the instruction, or only BOS. Raises CheckpointError if the
    tokenizer adds no BOS, on which Sprint's choice of positions relies.
    """

    def __init__(self, tokenizer: Tokenizer, instruction: str, max_tokens: int):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.prefix: tuple[int, ...] = tuple(tokenizer.encode(instruction).ids)
        if not tokenizer.encode("").ids:
            raise CheckpointError(
                "tokenizer: it adds no BOS token to a text; a Gemma tokenizer.json that does is needed"
            )
        longest = len(self.prefix) + max_tokens - 2 if instruction else max_tokens
        tokenizer.enable_truncation(longest)
        self._start = longest - (max_tokens - 1)
        self._instruction = instruction
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer

    @staticmethod
    def normalise(prompt: str) -> str:
        """Returns the text to encode, as diffusers does (NVlabs' own pipeline keeps the case)."""
        return prompt.lower().strip()

    def encode(self, prompt: str) -> Prompt:
        """Encodes instruction and prompt together, as a token may span their border."""
        text = self.normalise(prompt)
        encoding = self._tokenizer.encode(self._instruction + text)
        tokens = Tokens(tuple(encoding.ids), self._start)
        return Prompt(text, tokens, truncated=bool(encoding.overflowing))
