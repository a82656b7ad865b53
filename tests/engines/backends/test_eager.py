"""Eager backend: in bf16 on a CPU an image depends only on its job."""

import pytest
import torch

from engines.loader import load_engine
from engines.types import Job

PROMPTS = ["a circle", "two purple circles to the left of a green triangle on a black background", "three red squares"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_longer_prompt_in_the_batch_changes_no_image(steps: int) -> None:
    engines = [load_engine("tiny", precision="bf16", device="cpu") for _ in range(2)]
    width, height = engines[0].limits.default_size
    jobs = [Job(prompt, seed, width, height, steps) for seed, prompt in enumerate(PROMPTS * 2)]
    together = engines[0].generate(jobs)
    for job, image in zip(jobs, together, strict=True):
        [alone] = engines[1].generate([job])
        difference = torch.tensor(image.pixels).int() - torch.tensor(alone.pixels).int()
        assert difference.abs().max() <= 2  # from the decoder's sums; with padded texts it was 17
