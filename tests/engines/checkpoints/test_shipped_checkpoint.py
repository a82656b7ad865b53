"""The shipped checkpoint against diffusers' SanaSprintPipeline, from the same folder and the same seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline

from engines.loader import load_engine
from engines.types import Engine, Job

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"
PROMPT = "a red circle to the left of a blue square"


@pytest.fixture(scope="module")
def upstream() -> SanaSprintPipeline:
    pipeline = SanaSprintPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours() -> Engine:
    return load_engine(str(TINY), precision="fp32", schedule="diffusers")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 256), (128, 192)])
def test_no_pixel_differs_by_more_than_one(
    upstream: SanaSprintPipeline, ours: Engine, steps: int, width: int, height: int
) -> None:
    expected = upstream(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=4.5,
        generator=torch.Generator("cpu").manual_seed(5),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=24,
        output_type="np",
    ).images[0]
    (made,) = ours.generate([Job(PROMPT, 5, width, height, steps)])
    difference = np.abs((expected * 255).round().astype(int) - made.pixels.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert made.pixels.std() > 10
