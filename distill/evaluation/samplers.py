"""Images from a teacher or student in training: captions and seeds in, uint8 out, for the judge and the sheets."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.evaluation.scores import Generate
from distill.objectives.trigflow import as_flow, guided, sample_flow
from distill.recipes import Recipe
from distill.stages.teacher import Teacher
from distill.training.stage import to_uint8
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.sampler import angles_for, job_noise, sample
from engines.types import Pixels

BATCH = 24

Sampler = Callable[[Tensor, list[str]], Tensor]  # noise [B,C,h,w] and captions -> clean latents [B,C,h,w]


def teacher_sampler(recipe: Recipe, teacher: Teacher) -> Sampler:
    """Flow Euler with classifier-free guidance at the recipe's steps, shift and scale."""

    def conditioned(captions: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
        text, mask = teacher.caption(captions)
        return lambda x, t: teacher.transformer(x, text, t, torch.zeros_like(t), mask).float()

    def run(noise: Tensor, captions: list[str]) -> Tensor:
        empty = [""] * len(captions)
        velocity = guided(conditioned(captions), conditioned(empty), recipe.teacher_guidance)
        return sample_flow(velocity, noise, recipe.teacher_sampling_steps, recipe.teacher_sampling_shift)

    return run


def student_sampler(
    teacher: Teacher, student: SprintTransformer, guidance: float, steps: int, wrapped: bool = True
) -> Sampler:
    """The server's sampler at the paper's schedule; with wrapped False the student predicts F (ablation)."""

    def run(noise: Tensor, captions: list[str]) -> Tensor:
        text, mask = teacher.caption(captions)
        scale = torch.full((len(noise),), student.config.guidance_embeds_scale * guidance, device=noise.device)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            output: Tensor = student(x, text, time, scale, mask)
            return output.float()

        renoise = [torch.randn_like(noise) for _ in range(steps - 1)]
        return sample(velocity if wrapped else as_flow(velocity), noise, angles_for(steps), renoise)

    return run


def generator(recipe: Recipe, sampler: Sampler, autoencoder: Autoencoder) -> Generate:
    """Returns a function from captions and seeds to images, for distill.evaluation.scores."""
    config = autoencoder.config
    cells = recipe.image_size // config.compression
    device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def generate(captions: list[str], seeds: list[int]) -> list[Pixels]:
        images: list[Pixels] = []
        for first in range(0, len(captions), BATCH):
            chosen = seeds[first : first + BATCH]
            noise = torch.cat([job_noise(seed, (config.latent_channels, cells, cells), 1) for seed in chosen])
            with torch.autocast(device.type, torch.bfloat16, recipe.distil.bfloat16), sdpa_kernel(SDPBackend.MATH):
                latents = sampler(noise.to(device), captions[first : first + BATCH])
                decoded = autoencoder.decoder(latents / config.scaling_factor)
            images.extend(to_uint8(decoded))
        return images

    return generate
