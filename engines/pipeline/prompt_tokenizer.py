"""A prompt's way to token ids: the text that goes around it, what is kept of it, and where it is cut.

Follows diffusers token for token (pipelines/sana/pipeline_sana_sprint.py, encode_prompt): the prompt is lower-cased and
stripped, an instruction is put before it, the whole is cut to the instruction's length plus `max_tokens` - 2, and of
the hidden states only the first and the last `max_tokens` - 1 positions are used. Padding, which upstream masks, does
not exist here. Knows no tensors.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from engines.errors import CheckpointError
from engines.models.text_encoder import Tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the text encoder; prompts of equal `text` have equal embeddings."""

    text: str
    tokens: Tokens
    truncated: bool


class PromptTokenizer:
    """Prompts to token ids, with one instruction (or none) and one limit.

    `prefix` holds the ids that every prompt starts with: those of the instruction, or only the first token (BOS).
    Raises CheckpointError where the tokenizer adds no BOS, on which Sprint's choice of positions relies.
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
        """The text that is encoded, as diffusers has it (NVlabs' own pipeline does not lower the case)."""
        return prompt.lower().strip()

    def encode(self, prompt: str) -> Prompt:
        """The ids of instruction and prompt together, for tokens may join where the two meet."""
        text = self.normalise(prompt)
        encoding = self._tokenizer.encode(self._instruction + text)
        tokens = Tokens(tuple(encoding.ids), self._start)
        return Prompt(text, tokens, truncated=bool(encoding.overflowing))
