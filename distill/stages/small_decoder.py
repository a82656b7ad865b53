"""The small-decoder stage: a TAESANA decoder that copies the autoencoder's decoder on latents of the finished student.

The student's one-step predictions are what the server decodes, so they are the inputs here; half of a batch is noised
a little, for predictions of more steps. The targets are the images of the autoencoder's own decoder.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from distill.recipes import SmallDecoderStageConfig
from distill.stages.decoder_step import DecoderUpdate
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate, to_tensor
from distill.world.captions import caption_of
from distill.world.scenes import World, sample_scene
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.pixels import PixelDecoder
from engines.models.taesana import TaesanaDecoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import join, load_text_stage
from engines.sampler import angles_for, sample

BATCH = 16  # latents made at once
SEED = 7
EDGE_WEIGHT, SQUARE_WEIGHT = 0.5, 0.5  # of distill.stages.autoencoder.reconstruction_loss
LATENT_NOISE = 0.1  # standard deviation, for half of a batch
WARMUP, DECAY_FRACTION, EMA_DECAY = 50, 0.7, 0.998


@dataclass(frozen=True)
class DecodedLatents:
    """Unit-variance latents [N,C,h,w] and the uint8 images [N,H,W,3] that the full decoder makes of them."""

    latents: Tensor
    images: Tensor


def decoded_latents(
    config: SmallDecoderStageConfig, checkpoint: Checkpoint, world: World, device: torch.device
) -> DecodedLatents:
    """Returns the student's one-step latents for drawn captions, with their images."""
    rng = np.random.default_rng(SEED)
    transformer = checkpoint.load_transformer(torch.float32, device)
    text_stage = load_text_stage(checkpoint, torch.float32, device)
    decoder = PixelDecoder(checkpoint.load_autoencoder(torch.float32, device))
    side = checkpoint.settings.default_size[0] // checkpoint.autoencoder.compression
    guidance_scale = checkpoint.transformer.guidance_embeds_scale
    low, high = checkpoint.settings.guidance_trained
    latents, images = list[Tensor](), list[Tensor]()
    torch.manual_seed(SEED)
    with torch.inference_mode():
        for start in range(0, config.images, BATCH):
            count = min(BATCH, config.images - start)
            captions = [caption_of(sample_scene(world, rng).requirement, rng) for _ in range(count)]
            text, mask = join(text_stage.encode(captions))
            guidance = guidance_scale * (low + (high - low) * torch.rand(count, device=device))
            noise = torch.randn(1, count, checkpoint.transformer.in_channels, side, side, device=device)
            velocity = partial(_velocity, transformer, text, guidance, mask)
            latent = sample(velocity, noise[0], angles_for(1), noise[1:])
            latents.append(latent)
            images.append(decoder(latent)[0])
    return DecodedLatents(torch.cat(latents).clone(), torch.cat(images).clone())


def _velocity(
    transformer: SprintTransformer, text: Tensor, guidance: Tensor, mask: Tensor | None, x: Tensor, time: Tensor
) -> Tensor:
    velocity: Tensor = transformer(x, text, time, guidance, mask)
    return velocity


def train(
    config: SmallDecoderStageConfig, world: World, checkpoint: Checkpoint, folder: Path, accelerator: Accelerator
) -> TaesanaDecoder:
    """Trains or resumes, and returns the decoder with averaged weights."""
    torch.manual_seed(SEED)
    decoder = TaesanaDecoder(config.architecture).to(accelerator.device)
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    optimizer: Any = torch.optim.AdamW(decoder.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = Ema(decoder, EMA_DECAY)
    parts = {"model": decoder, "average": average, "optimizer": optimizer}
    stage = Stage(folder, "small_decoder", config.steps, parts, accelerator.is_main_process)
    done = stage.resume()
    optimizer = accelerator.prepare(optimizer)
    pairs = None if done else decoded_latents(config, checkpoint, world, accelerator.device)
    update = DecoderUpdate(stage, accelerator, decoder, optimizer, average, (EDGE_WEIGHT, SQUARE_WEIGHT))
    for step in stage if pairs is not None else ():
        assert pairs is not None
        torch.manual_seed(SEED + 7919 * step)
        rows = torch.randint(len(pairs.latents), (config.batch,))
        latents, target = pairs.latents[rows], to_tensor(pairs.images[rows].cpu().numpy()).to(accelerator.device)
        noised = torch.arange(config.batch) % 2 == 0
        latents = latents + LATENT_NOISE * torch.randn_like(latents) * noised[:, None, None, None].to(latents)
        factor = learning_rate_factor(step, config.steps, WARMUP, DECAY_FRACTION)
        set_learning_rate(optimizer, config.learning_rate * factor)
        output = decoder(latents.contiguous(memory_format=torch.channels_last))
        update.step(output, target)
    average.copy_to(decoder)
    return decoder.eval()
