"""Embeddings of real prompts, for the comparison of engines and the calibration of fp8 scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.random_weights import RandomWeights
from engines.pipeline.text_stage import TextStage, join, load_text_stage

# Short and long, plain and rich, and of the tiny world.
PROMPTS = (
    "a red circle to the left of a blue square on a white background",
    "a tiny astronaut hatching from an egg on the moon, cinematic light, highly detailed",
    "three green triangles",
    "a portrait of an old fisherman with a white beard, soft window light, 85mm photograph",
    "a purple square above a yellow circle on a gray background",
    "a bowl of ramen with a soft boiled egg, steam, top view",
    "an orange circle on a black background",
    "a city street at night in the rain, neon signs reflected in puddles, a woman with a red umbrella walks away from "
    "the camera, film grain, wide angle, a tram in the distance and people under shop awnings",
    "two blue circles",
    "a watercolor painting of a fox in a snowy birch forest",
    "a white square below a red triangle",
    "the word hello written in chalk on a blackboard",
    "a yellow triangle",
    "a low poly island with a lighthouse, isometric, pastel colours",
    "one purple circle to the right of a green square",
    "macro photograph of a dragonfly wing, iridescent, black background",
)
_LARGE = 1024  # hidden size from which the text encoder runs in bf16, the published dtype of Gemma


@dataclass(frozen=True)
class CalibrationPrompts:
    """Text inputs of the transformer for prompts, padded to the length of built engines."""

    states: Tensor  # [P, tokens, D], fp32
    mask: Tensor  # [P, tokens], bool

    def rows(self, count: int) -> "CalibrationPrompts":
        """Returns the first `count` prompts, and repeats them if there are fewer."""
        index = torch.arange(count) % self.states.shape[0]
        return CalibrationPrompts(self.states[index], self.mask[index])


def calibration_prompts(checkpoint: Checkpoint, stage: TextStage | None = None) -> CalibrationPrompts:
    """Returns PROMPTS through the text stage (None: loads it); for random weights, noise of different lengths."""
    tokens, width = checkpoint.settings.max_prompt_tokens, checkpoint.transformer.caption_channels
    if isinstance(checkpoint.weights, RandomWeights):
        generator = torch.Generator().manual_seed(checkpoint.weights.seed)
        states = torch.randn(len(PROMPTS), tokens, width, generator=generator)
        lengths = tokens - torch.arange(len(PROMPTS)) * tokens // (2 * len(PROMPTS))
        return CalibrationPrompts(states, torch.arange(tokens) < lengths[:, None])
    if stage is None:
        dtype = torch.bfloat16 if width >= _LARGE else torch.float32
        stage = load_text_stage(checkpoint, dtype, torch.device("cpu"))
    states, mask = join([stage.encode([prompt])[0] for prompt in PROMPTS])
    states, mask = states.cpu(), None if mask is None else mask.cpu()
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
    missing = tokens - states.shape[1]
    pad = torch.nn.functional.pad
    return CalibrationPrompts(pad(states.float(), (0, 0, 0, missing)), pad(mask, (0, missing)))
