"""Stage 1: an autoencoder of rendered scenes with 32 latent channels at 1/32 of the side; then its decoder alone.

Loss: L1 + edges (L1 of finite differences, so that outlines stay crisp) + squares + a penalty. The penalty keeps every
latent channel at mean 0 and variance 1. Training adds noise to the latents before it decodes them.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from distill.recipes import AutoencoderStageConfig, Recipe
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate, to_tensor
from distill.world.rendering import World, batches
from engines.models.dcae import Autoencoder

REPORT_EVERY = 100


def reconstruction_loss(output: Tensor, target: Tensor, edge_weight: float, square_weight: float) -> Tensor:
    """Returns L1 + edge_weight * L1 of differences along both axes + square_weight * MSE: [B,3,H,W] -> scalar."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edge_weight * edges + square_weight * error.square().mean()


def moment_loss(latent: Tensor) -> Tensor:
    """Returns mean^2 + (variance - 1)^2 per channel over batch and positions: [B,C,h,w] -> scalar."""
    mean, variance = latent.mean(dim=(0, 2, 3)), latent.var(dim=(0, 2, 3))
    return (mean.square() + (variance - 1).square()).mean()


def crops(world: World, size: int, crop: int, batch: int, seed: int, start: int) -> Iterator[Tensor]:
    """Yields [batch,3,crop,crop] in [-1,1] without end: four random crops per scene, or it whole if crop is size."""
    per_scene = 1 if crop == size else 4
    scenes = batches(world, size, max(1, batch // per_scene), seed, start=start)
    for index, (images, _) in enumerate(scenes, start):
        rng = np.random.default_rng((seed, index))
        corners = rng.integers(0, size - crop + 1, (len(images), per_scene, 2))
        cut = [
            image[y : y + crop, x : x + crop] for image, points in zip(images, corners, strict=True) for y, x in points
        ]
        yield to_tensor(cut).contiguous(memory_format=torch.channels_last)


def build(recipe: Recipe) -> Autoencoder:
    """Makes the untrained network of a recipe. Raises ValueError if the recipe lacks this stage."""
    torch.manual_seed(recipe.seed)
    return Autoencoder(_config(recipe).architecture)


def train(recipe: Recipe, folder: Path, accelerator: Accelerator) -> Autoencoder:
    """Trains or resumes encoder and decoder together; returns the averaged weights."""
    config = _config(recipe)
    model = build(recipe)
    _fit("autoencoder", config.steps, model, model, recipe, folder, accelerator)
    return model


def train_decoder(recipe: Recipe, model: Autoencoder, folder: Path, accelerator: Accelerator) -> Autoencoder:
    """Trains the decoder further behind the frozen encoder, for sharper images of the same latents.

    The teacher can train meanwhile, since the latents stay the same (as dc-ae-f32c32-sana-1.1 followed 1.0).
    """
    config = _config(recipe)
    model.encoder.requires_grad_(False)
    _fit("decoder", config.decoder_steps, model, model.decoder, recipe, folder, accelerator)
    model.encoder.requires_grad_(True)
    return model


def _config(recipe: Recipe) -> AutoencoderStageConfig:
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
    """Runs one stage on `trained`, the model or a part of it, and leaves the averaged weights there."""
    config = _config(recipe)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    average = Ema(trained, config.ema)
    optimizer = torch.optim.AdamW(trained.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    parts = {"model": trained, "average": average, "optimizer": optimizer}
    stage = Stage(folder, name, steps, parts, accelerator.is_main_process)
    done = stage.resume()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    whole_from = int(steps * (1 - config.whole_fraction))
    stream: Iterator[Tensor] | None = None
    seed = recipe.seed + 1000 * accelerator.process_index + len(name)
    for step in stage if not done else ():
        if stream is None or step == whole_from:
            crop = recipe.image_size if step >= whole_from else config.crop
            batch = max(1, config.batch * config.crop**2 // crop**2)
            stream = crops(recipe.wide_world or recipe.world, recipe.image_size, crop, batch, seed, step)
        target = next(stream).to(accelerator.device)
        set_learning_rate(optimizer, config.learning_rate * learning_rate_factor(step, steps, 100, 0.6))
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            latent = prepared.encoder(target)
            output = prepared.decoder(latent + config.latent_noise * torch.randn_like(latent))
        fit = reconstruction_loss(output.float(), target, config.edge_weight, config.square_weight)
        optimizer.zero_grad()
        accelerator.backward(fit + config.moment_weight * moment_loss(latent.float()))
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
