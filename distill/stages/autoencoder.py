"""Stage 1: the autoencoder. Rendered scenes in, the same scenes out, through 32 latent channels at 1/32 of the side.

Loss: L1 + edges (L1 of finite differences, so that outlines stay crisp) + squares + a penalty that keeps every latent
channel at mean 0 and variance 1, with noise on the latents before they are decoded. Then the decoder alone.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from distill.recipes import AutoencoderStage, Recipe
from distill.training.stage import Average, Stage, learning_rate_factor, to_tensor
from distill.world.rendering import World, batches
from engines.models.dcae import Autoencoder

REPORT_EVERY = 100


def reconstruction_loss(output: Tensor, target: Tensor, edge_weight: float, square_weight: float) -> Tensor:
    """L1 + edge_weight * L1 of differences along both axes + square_weight * MSE. [B,3,H,W] -> scalar."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edge_weight * edges + square_weight * error.square().mean()


def moment_loss(latent: Tensor) -> Tensor:
    """mean^2 + (variance - 1)^2 per channel over batch and positions. [B,C,h,w] -> scalar."""
    mean, variance = latent.mean(dim=(0, 2, 3)), latent.var(dim=(0, 2, 3))
    return (mean.square() + (variance - 1).square()).mean()


def crops(world: World, size: int, crop: int, batch: int, seed: int, start: int) -> Iterator[Tensor]:
    """Endless [batch,3,crop,crop] in [-1,1]: four random crops of every scene (whole scenes where crop is size)."""
    per_scene = 1 if crop == size else 4
    scenes = batches(world, size, max(1, batch // per_scene), seed, start=start)
    for index, (pictures, _) in enumerate(scenes, start):
        rng = np.random.default_rng((seed, index))
        corners = rng.integers(0, size - crop + 1, (len(pictures), per_scene, 2))
        cut = [
            picture[y : y + crop, x : x + crop]
            for picture, places in zip(pictures, corners, strict=True)
            for y, x in places
        ]
        yield to_tensor(np.stack(cut)).contiguous(memory_format=torch.channels_last)


def build(recipe: Recipe) -> Autoencoder:
    """The untrained network of a recipe that has this stage."""
    torch.manual_seed(recipe.seed)
    return Autoencoder(_numbers(recipe).architecture)


def train(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Autoencoder:
    """Trains or resumes encoder and decoder together; returns the averaged weights."""
    numbers = _numbers(recipe)
    model = build(recipe)
    _fit("autoencoder", numbers.steps, model, model, recipe, folder, accelerator)
    return model


def polish(recipe: Recipe, model: Autoencoder, folder: Path, accelerator: Accelerator) -> Autoencoder:
    """Trains the decoder further behind the frozen encoder: sharper pictures of the same latents.

    It can run beside the teacher's training, as dc-ae-f32c32-sana-1.1 followed 1.0.
    """
    numbers = _numbers(recipe)
    model.encoder.requires_grad_(False)
    _fit("decoder", numbers.polish_steps, model, model.decoder, recipe, folder, accelerator)
    model.encoder.requires_grad_(True)
    return model


def _numbers(recipe: Recipe) -> AutoencoderStage:
    if recipe.autoencoder is None:
        raise ValueError(f"recipe {recipe.name} trains no autoencoder; give a checkpoint that holds one")
    return recipe.autoencoder


def _fit(
    name: str,
    steps: int,
    model: Autoencoder,
    trained: nn.Module,
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """One stage: `trained` is the model or a part of it. Leaves the averaged weights in it."""
    numbers = _numbers(recipe)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    average = Average(trained, numbers.ema)
    optimizer = torch.optim.AdamW(trained.parameters(), numbers.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    parts = {"model": trained, "average": average, "optimizer": optimizer}
    stage = Stage(folder, name, steps, parts, accelerator.is_main_process)
    done = stage.resume()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    whole_from = int(steps * (1 - numbers.whole_fraction))
    stream: Iterator[Tensor] | None = None
    seed = recipe.seed + 1000 * accelerator.process_index + len(name)
    for step in stage if not done else ():
        if stream is None or step == whole_from:
            crop = recipe.image_size if step >= whole_from else numbers.crop
            batch = max(1, numbers.batch * numbers.crop**2 // crop**2)
            stream = crops(recipe.wide_world or recipe.world, recipe.image_size, crop, batch, seed, step)
        target = next(stream).to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = numbers.learning_rate * learning_rate_factor(step, steps, 100, 0.6)
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            latent = prepared.encoder(target)
            output = prepared.decoder(latent + numbers.latent_noise * torch.randn_like(latent))
        fit = reconstruction_loss(output.float(), target, numbers.edge_weight, numbers.square_weight)
        optimizer.zero_grad()
        accelerator.backward(fit + numbers.moment_weight * moment_loss(latent.float()))
        norm = accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update(trained, step)
        if (step + 1) % REPORT_EVERY == 0:
            error = F.mse_loss(output.detach().float().clamp(-1, 1), target).item()
            stage.report(loss=fit.item(), psnr=10 * math.log10(4 / error), gradient=float(norm))
        if (step + 1) % (5 * REPORT_EVERY) == 0:
            stage.sheet(torch.cat([target[:8], output[:8].float()]))
    average.copy_to(trained)
    model.eval()
