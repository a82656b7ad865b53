"""The last stage: the decoder alone, on latents as the finished student predicts them. Ours, not the paper's.

A student's latents are not the encoder's: outlines waver, corners melt. The decoder meets them here beforehand. Half
of each batch are pictures that were encoded, noised to a moderate angle and predicted in one evaluation, so that the
place of everything is still known; the other half are plain latents with noise, of the wide world where there is one.
Encoder, teacher and student stay as they are. The paper's autoencoder is published and frozen; this one is our own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.recipes import AutoencoderStage, Recipe
from distill.stages.autoencoder import reconstruction_loss
from distill.stages.teacher import Teacher
from distill.training.stage import Average, Stage, learning_rate_factor, to_tensor
from distill.world.rendering import World, batches
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.sampler import input_scale, mix

REPORT_EVERY = 50
SHEET_EVERY = 500


def predicted(
    clean: Tensor,
    captions: list[str],
    taught: Teacher,
    student: SprintTransformer,
    guidance: float,
    times: tuple[float, float],
) -> Tensor:
    """The student's clean prediction of [B,C,h,w] latents, each noised to a flow time drawn from `times`."""
    low, high = times
    time = low + (high - low) * torch.rand(len(clean), device=clean.device)
    column = time[:, None, None, None]
    x = input_scale(column) * mix(clean, torch.randn_like(clean), torch.atan2(time, 1 - time))
    text, mask = taught.caption(captions)
    scale = torch.full_like(time, student.config.guidance_embeds_scale * guidance)
    clean_prediction: Tensor = x - column * student(x, text, time, scale, mask).float()
    return clean_prediction


def train(
    recipe: Recipe,
    model: Autoencoder,
    taught: Teacher,
    student: SprintTransformer,
    folder: Path,
    accelerator: Accelerator,
) -> Autoencoder:
    """Trains or resumes; returns the autoencoder with its decoder's averaged weights."""
    numbers = recipe.autoencoder
    if numbers is None:
        raise ValueError(f"recipe {recipe.name} trains no autoencoder; its decoder is not ours to sharpen")
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    average = Average(decoder, numbers.ema)
    optimizer = torch.optim.AdamW(decoder.parameters(), numbers.sharpen_rate, betas=(0.9, 0.95), weight_decay=0.0)
    parts = {"model": decoder, "average": average, "optimizer": optimizer}
    stage = Stage(folder, "sharpen", numbers.sharpen_steps, parts, accelerator.is_main_process)
    done = stage.resume()
    prepared, optimizer = accelerator.prepare(decoder, optimizer)
    stream = _pictures(recipe, numbers, recipe.seed + 3 + 1000 * accelerator.process_index, stage.step)
    device, scaling = accelerator.device, model.config.scaling_factor
    guidance = recipe.distil.guidance
    for step in stage if not done else ():
        torch.manual_seed(recipe.seed + 7919 * step + accelerator.process_index)
        target, captions = next(stream)
        target, half = target.to(device), len(captions)
        factor = learning_rate_factor(step, numbers.sharpen_steps, 50, 0.7)
        for group in optimizer.param_groups:
            group["lr"] = numbers.sharpen_rate * factor
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                clean = (model.encoder(target) * scaling).float()
                chosen = guidance[step % len(guidance)]
                guessed = predicted(clean[:half], captions, taught, student, chosen, numbers.predicted_times)
                plain = clean[half:] + scaling * numbers.latent_noise * torch.randn_like(clean[half:])
            output = prepared(torch.cat([guessed, plain]) / scaling).float()
        fit = reconstruction_loss(output, target, numbers.edge_weight, numbers.square_weight)
        optimizer.zero_grad()
        accelerator.backward(fit)
        norm = accelerator.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update(decoder, step)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(loss=fit.item(), gradient=float(norm))
        if (step + 1) % SHEET_EVERY == 0:
            stage.sheet(torch.cat([target, output.detach()]), len(target))
    average.copy_to(decoder)
    return model.eval()


def _pictures(recipe: Recipe, numbers: AutoencoderStage, seed: int, start: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless [2N,3,H,W] in [-1,1], the first N of the recipe's world, and the captions of those."""
    world = recipe.world
    freer: World = replace(recipe.wide_world or world, backgrounds=world.backgrounds)
    half = numbers.sharpen_batch // 2
    narrow = batches(world, recipe.image_size, half, seed, start)
    wide = batches(freer, recipe.image_size, half, seed + 1, start)
    for (near, captions), (far, _) in zip(narrow, wide, strict=True):
        yield torch.cat([to_tensor(near), to_tensor(far)]).contiguous(memory_format=torch.channels_last), captions
