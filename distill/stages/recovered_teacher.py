"""A flow teacher recovered from a finished student, for experiments where the run that trained both is gone.

The student began as a copy of its teacher, and distillation moved its weights little. So the velocity loss alone brings
a teacher back in a few hundred steps. It is not the student's own teacher, but one of its kind.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.recipes import Recipe
from distill.stages.published_teacher import PublishedCaptioner
from distill.stages.teacher import Teacher, shifted_time, zero_guidance
from distill.training.latents import Latents, encode_scenes
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.dcae import Autoencoder
from engines.pipeline.text_stage import load_text_stage

STEPS = 320  # a teacher of tiny then draws 0.974 of 192 captions right (distill/LOG.md)
RATE = 0.4  # of the teacher's learning rates
WARMUP = 50
IMAGES = 16_000  # at most
REPORT_EVERY = 50


@dataclass(frozen=True)
class Recovered:
    """The start of a distillation, taken out of a finished checkpoint: in float32."""

    teacher: Teacher
    autoencoder: Autoencoder
    latents: Latents


def recover(recipe: Recipe, checkpoint: Checkpoint, folder: Path, steps: int, device: torch.device) -> Recovered:
    """Trains or resumes FOLDER/recovered.pt. Raises ValueError if the recipe trains no teacher, CheckpointError.

    Scenes are rendered and encoded once, into FOLDER/latents.pt.
    """
    config = recipe.teacher
    if config is None:
        raise ValueError(f"recipe {recipe.name} trains no teacher, so none can be recovered")
    model = checkpoint.load_transformer(torch.float32, device)
    autoencoder = checkpoint.load_autoencoder(torch.float32, device).requires_grad_(False)
    caption = PublishedCaptioner(load_text_stage(checkpoint, torch.float32, device))
    images = min(IMAGES, config.narrow_latents or config.latents)
    path = folder / "latents.pt"
    latents = encode_scenes(recipe.world, autoencoder, recipe.image_size, images, recipe.seed + 1, path)
    zero_guidance(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("guidance_embedder" not in name)
    of_blocks, rest = split_parameters(model)
    rates = {"matrices": RATE * config.matrix_learning_rate, "others": RATE * config.learning_rate}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "matrices": Muon(of_blocks, rates["matrices"]),
        "others": torch.optim.AdamW(rest, rates["others"], betas=(0.9, 0.95), weight_decay=0.0),
    }
    average = Ema(model, config.ema)
    stage = Stage(folder, "recovered", steps, {"model": model, "average": average} | optimizers)
    done = stage.resume()
    stream = latents.batches(config.batch, recipe.seed + 1, stage.step)
    for step in stage if not done else ():
        batch = next(stream)
        keep = torch.rand(config.batch) >= config.caption_dropout
        text, mask = caption([words if kept else "" for words, kept in zip(batch.captions, keep, strict=True)])
        clean = batch.latents.to(device)
        noise, time = torch.randn_like(clean), shifted_time(len(clean), config.time_shift, device)
        weight = time[:, None, None, None]
        with sdpa_kernel(SDPBackend.MATH):
            velocity = model((1 - weight) * clean + weight * noise, text, time, torch.zeros_like(time), mask)
        loss = F.mse_loss(velocity, noise - clean)
        factor = learning_rate_factor(step, steps, WARMUP, 1.0)
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            set_learning_rate(optimizer, factor * rates[name])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        average.update(model, step)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(loss=loss.item())
    average.copy_to(model)
    return Recovered(Teacher(model.eval(), caption), autoencoder, latents)
