"""The last stage: trains the decoder alone on the finished student's predictions. Ours, not the paper's.

A student's latents differ from the encoder's: outlines waver and corners are rounder. Half of each batch are encoded
images, noised to a moderate angle and predicted in one evaluation, so that positions stay known. The other half are
encoder latents with noise, of the wide world if the recipe has one. Encoder, teacher and student are frozen. The
paper's autoencoder is published and frozen; this one is our own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.recipes import AutoencoderStageConfig, Recipe
from distill.stages.decoder_step import DecoderUpdate
from distill.stages.teacher import Teacher
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate, to_tensor
from distill.world.rendering import World, batches
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.sampler import input_scale, mix


def predicted(
    clean: Tensor,
    captions: list[str],
    teacher: Teacher,
    student: SprintTransformer,
    guidance: float,
    times: tuple[float, float],
) -> Tensor:
    """Returns the student's clean prediction of latents [B,C,h,w], each noised to a random flow time in `times`."""
    low, high = times
    time = low + (high - low) * torch.rand(len(clean), device=clean.device)
    column = time[:, None, None, None]
    x = input_scale(column) * mix(clean, torch.randn_like(clean), torch.atan2(time, 1 - time))
    text, mask = teacher.caption(captions)
    scale = torch.full_like(time, student.config.guidance_embeds_scale * guidance)
    clean_prediction: Tensor = x - column * student(x, text, time, scale, mask).float()
    return clean_prediction


def train(
    recipe: Recipe,
    model: Autoencoder,
    teacher: Teacher,
    student: SprintTransformer,
    folder: Path,
    accelerator: Accelerator,
) -> Autoencoder:
    """Trains or resumes the decoder and returns the autoencoder with its averaged weights."""
    config = recipe.autoencoder
    if config is None:
        raise ValueError(f"recipe {recipe.name} trains no autoencoder; so no decoder to sharpen")
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    average = Ema(decoder, config.ema)
    optimizer = torch.optim.AdamW(decoder.parameters(), config.sharpen_rate, betas=(0.9, 0.95), weight_decay=0.0)
    parts = {"model": decoder, "average": average, "optimizer": optimizer}
    stage = Stage(folder, "sharpen", config.sharpen_steps, parts, accelerator.is_main_process)
    done = stage.resume()
    prepared, optimizer = accelerator.prepare(decoder, optimizer)
    stream = _images(recipe, config, recipe.seed + 3 + 1000 * accelerator.process_index, stage.step)
    device, scaling = accelerator.device, model.config.scaling_factor
    guidance = recipe.distil.guidance
    weights = (config.edge_weight, config.square_weight)
    update = DecoderUpdate(stage, accelerator, decoder, optimizer, average, weights)
    for step in stage if not done else ():
        torch.manual_seed(recipe.seed + 7919 * step + accelerator.process_index)
        target, captions = next(stream)
        target, half = target.to(device), len(captions)
        factor = learning_rate_factor(step, config.sharpen_steps, 50, 0.7)
        set_learning_rate(optimizer, config.sharpen_rate * factor)
        with torch.autocast(device.type, torch.bfloat16, recipe.distil.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                clean = (model.encoder(target) * scaling).float()
                chosen = guidance[step % len(guidance)]
                predictions = predicted(clean[:half], captions, teacher, student, chosen, config.predicted_times)
                plain = clean[half:] + scaling * config.latent_noise * torch.randn_like(clean[half:])
            output = prepared(torch.cat([predictions, plain]) / scaling).float()
        update.step(output, target)
    average.copy_to(decoder)
    return model.eval()


def _images(
    recipe: Recipe, config: AutoencoderStageConfig, seed: int, start: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields [2N,3,H,W] in [-1,1] without end, the first N of the recipe's world, and the captions of those."""
    world = recipe.world
    wide_world: World = replace(recipe.wide_world or world, backgrounds=world.backgrounds)
    half = config.sharpen_batch // 2
    narrow = batches(world, recipe.image_size, half, seed, start)
    wide = batches(wide_world, recipe.image_size, half, seed + 1, start)
    for (near, captions), (far, _) in zip(narrow, wide, strict=True):
        yield torch.cat([to_tensor(near), to_tensor(far)]).contiguous(memory_format=torch.channels_last), captions
