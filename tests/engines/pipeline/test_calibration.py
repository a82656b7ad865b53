"""The prompts of calibration and comparison."""

from dataclasses import replace
from pathlib import Path

import torch
from random_modules import RECIPE, random_transformer

from engines.artifacts.reference import clean_latent, max_activations, reference_inputs
from engines.checkpoints.checkpoint import open_checkpoint
from engines.checkpoints.random_weights import RandomWeights
from engines.pipeline.calibration import PROMPTS, calibration_prompts
from engines.sampler import sample


def test_prompts_pass_through_the_checkpoints_own_text_encoder(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    texts = calibration_prompts(checkpoint)
    assert texts.states.shape == (len(PROMPTS), 300, checkpoint.transformer.caption_channels)
    assert texts.mask.sum(1).unique().numel() > 3, "prompts of several lengths"
    assert not texts.states[~texts.mask].any()
    again = texts.rows(len(PROMPTS) + 1)
    assert torch.equal(again.states[-1], texts.states[0])


def test_random_weights_get_noise_for_text(folder: Path) -> None:
    checkpoint = replace(open_checkpoint(str(folder)), weights=RandomWeights(3))
    texts = calibration_prompts(checkpoint)
    assert texts.states.shape[1:] == (300, 48)
    assert abs(float(texts.states.std()) - 1) < 0.01
    assert texts.mask.sum(1).unique().numel() == len(PROMPTS)


def test_the_chain_is_the_samplers_first_step() -> None:
    noise = torch.randn(1, 32, 4, 4)

    def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x.cos() * time[:, None, None, None]

    start, time, guidance = reference_inputs(noise)
    clean = clean_latent(start, velocity(start, time), time)
    torch.testing.assert_close(clean, sample(velocity, noise, [torch.pi / 2], []))
    several = reference_inputs(noise.expand(3, -1, -1, -1))
    assert all(values.unique().numel() == 3 for values in several[1:])
    assert float(guidance) == float(torch.tensor(0.45))


def test_peaks_see_what_goes_into_and_out_of_every_part() -> None:
    module = random_transformer()
    text = torch.randn(1, 5, RECIPE.teacher.architecture.caption_channels)
    with torch.inference_mode(), max_activations(module) as seen:
        module(torch.randn(1, 32, 4, 4), text, torch.ones(1), torch.full((1,), 0.45))
    assert seen.keys() >= {"transformer_blocks.0", "transformer_blocks.1.ff.conv_point", "patch_embed.proj"}
    with torch.inference_mode(), max_activations(module) as louder:
        module(torch.full((1, 32, 4, 4), 1e6), text, torch.ones(1), torch.full((1,), 0.45))
    assert louder["patch_embed.proj"] >= 1e6
    assert not module.patch_embed.proj._forward_hooks
