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

# Written for a language model that expands prompts; Sprint only reads the hidden states behind it. Verbatim, since
# every character decides token ids (NVlabs' own files differ from these in the quotes around "Enhanced prompt").
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)


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
