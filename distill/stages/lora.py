"""The LoRA stage: low-rank updates of a finished, frozen student that teach it one more shape.

The text encoder does not know the shape's name and encodes all unknown words as one token. The updates learn to draw
the shape for this token. Things stand at fixed positions, so that the mean which a squared error finds is a sharp image
(as in distill.stages.controlnet). For captions without the shape the target is the student's own prediction.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from distill.objectives import losses
from distill.recipes import LoraStageConfig
from distill.training.latents import CHUNK
from distill.training.stage import Ema, Stage, learning_rate_factor, save_atomically, set_learning_rate, to_tensor
from distill.world.captions import caption_of
from distill.world.rendering import Scene, World, render, sample_scene
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import TextStage, join, load_text_stage
from engines.sampler import flow_time, input_scale, mix

REPORT_EVERY = 20


class LowRankUpdate(nn.Module):
    """A parametrization that adds up @ down, zero at the start, to a weight [out, in] or [out, in, 1, 1]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inputs = weight.shape[:2]
        self.down = nn.Parameter(nn.init.normal_(torch.empty(rank, inputs), std=inputs**-0.5))
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class LowRankUpdates(nn.Module):
    """Updates of every linear map and 1x1 convolution on text or tokens, by the name of the module."""

    def __init__(self, transformer: SprintTransformer, rank: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.parts = nn.ModuleList()
        for name, module in transformer.named_modules():
            if name.startswith(("transformer_blocks.", "caption_projection.")) and is_target(module):
                self.names.append(name)
                self.parts.append(LowRankUpdate(cast(Tensor, module.weight), rank))
        for name, part in zip(self.names, self.parts, strict=True):
            parametrize.register_parametrization(transformer.get_submodule(name), "weight", part)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the factors under the keys of diffusers' SanaLoraLoaderMixin; alpha is the rank (scale 1)."""
        tensors = {}
        for name, part in zip(self.names, cast(list[LowRankUpdate], list(self.parts)), strict=True):
            tensors[f"transformer.{name}.lora_A.weight"] = part.down.detach()
            tensors[f"transformer.{name}.lora_B.weight"] = part.up.detach()
        return tensors


def is_target(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes and their latents [N,C,h,w]."""

    latents: Tensor
    scenes: list[Scene]


def with_shape(world: World, shape: str) -> World:
    """Returns the world with one more shape."""
    return replace(world, shapes=(*world.shapes, shape))


def without_jitter(world: World) -> World:
    """Returns the world with every range narrowed to its middle."""
    return replace(
        world,
        sizes=tuple((name, (sum(ends) / 2, sum(ends) / 2)) for name, ends in world.sizes),
        single_size=(sum(world.single_size) / 2,) * 2,
        pair_size=(sum(world.pair_size) / 2,) * 2,
        count_size=(sum(world.count_size) / 2,) * 2,
        single_jitter=0.0,
        pair_jitter=0.0,
        pair_offset=0.0,
        count_jitter=0.0,
        max_angle=0.0,
        tint=0,
    )


def scenes_with_shape(world: World, shape: str, count: int, seed: int) -> list[Scene]:
    """Draws scenes of the training split in which at least one thing has the shape."""

    def endless() -> Iterator[Scene]:
        rng = np.random.default_rng(seed)
        while True:
            scene = sample_scene(world, rng)
            if any(thing.shape == shape for thing in scene.things):
                yield scene

    return [scene for _, scene in zip(range(count), endless(), strict=False)]


@torch.no_grad()
def encode(autoencoder: Autoencoder, scenes: list[Scene], world: World, size: int, path: Path) -> EncodedScenes:
    """Renders and encodes the scenes, or reads their latents from `path` if an earlier run saved them."""
    if path.exists():
        cached: Tensor = torch.load(path, map_location="cpu", weights_only=True)
        if len(cached) == len(scenes):
            return EncodedScenes(cached, scenes)
    device, chunks = next(autoencoder.parameters()).device, []
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    for first in tqdm(range(0, len(scenes), CHUNK), desc="encode", mininterval=5):
        pixels = to_tensor([render(world, scene, size) for scene in scenes[first : first + CHUNK]])
        with torch.autocast(device.type, torch.bfloat16):
            chunks.append(autoencoder.encoder(pixels.to(device, memory_format=torch.channels_last)).float())
    latents = (torch.cat(chunks) * autoencoder.config.scaling_factor).cpu()
    save_atomically(latents, path)
    return EncodedScenes(latents, scenes)


class LoraTraining:
    """The student with its updates, the student before, the encoded scenes, and the loss of a batch."""

    def __init__(
        self, config: LoraStageConfig, checkpoint: Checkpoint, world: World, folder: Path, device: torch.device
    ) -> None:
        self.config, self.world = config, with_shape(world, config.shape)
        self.guidance = checkpoint.settings.guidance_trained
        self.before = checkpoint.load_transformer(torch.float32, device)
        self.student = checkpoint.load_transformer(torch.float32, device)
        torch.manual_seed(config.seed)
        self.updates = LowRankUpdates(self.student, config.rank).to(device)
        self.text: TextStage = load_text_stage(checkpoint, torch.float32, device)
        autoencoder, size = checkpoint.load_autoencoder(torch.float32, device), checkpoint.settings.default_size[0]
        new = scenes_with_shape(without_jitter(self.world), config.shape, config.images, config.seed)
        rng = np.random.default_rng((config.seed, 1))
        old = [sample_scene(world, rng) for _ in range(max(1, config.images // 2))]
        self.new, self.old = (
            encode(autoencoder, scenes, self.world, size, folder / f"{name}.pt")
            for name, scenes in (("new", new), ("old", old))
        )

    def loss(self, step: int) -> Tensor:
        """Returns the clean prediction's mean squared error, against the student's for captions without the shape."""
        config, rng = self.config, np.random.default_rng((self.config.seed, step))
        old = round(config.batch * config.old_fraction)
        rows = [(self.old, int(row)) for row in rng.integers(0, len(self.old.scenes), old)]
        rows += [(self.new, int(row)) for row in rng.integers(0, len(self.new.scenes), config.batch - old)]
        text, mask = join(self.text.encode([caption_of(part.scenes[row].requirement, rng) for part, row in rows]))
        clean = torch.stack([part.latents[row] for part, row in rows]).to(text.device)
        angle = losses.angles(len(rows), config.mean, config.std)
        angle = losses.with_max_time(angle, config.max_time_probability).to(clean.device)
        low, high = self.guidance
        guidance = self.student.config.guidance_embeds_scale * (low + (high - low) * torch.rand_like(angle))
        time = flow_time(angle)
        column = time[:, None, None, None]
        x = input_scale(time)[:, None, None, None] * mix(clean, torch.randn_like(clean), angle)
        inputs = (x, text.clone(), time, guidance, mask)
        predicted = x - column * self.student(*inputs).float()
        if old:
            first = [None if value is None else value[:old] for value in inputs]
            with torch.no_grad():
                before: Tensor = x[:old] - column[:old] * self.before(*first).float()
            clean = torch.cat([before, clean[old:]])
        return F.mse_loss(predicted, clean)


def train(
    config: LoraStageConfig, world: World, checkpoint: Checkpoint, folder: Path, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Trains or resumes, and returns the averaged updates under diffusers' keys."""
    training = LoraTraining(config, checkpoint, world, folder, accelerator.device)
    updates = training.updates
    optimizer: Any = torch.optim.AdamW(updates.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = Ema(updates, config.ema)
    parts = {"additions": updates, "average": average, "optimizer": optimizer}
    stage = Stage(folder, "lora", config.steps, parts, accelerator.is_main_process)
    done = stage.resume()
    optimizer = accelerator.prepare(optimizer)
    mean_loss = 0.0
    for step in stage if not done else ():
        torch.manual_seed(config.seed + 7919 * step)
        factor = learning_rate_factor(step, config.steps, config.warmup, config.decay_fraction)
        set_learning_rate(optimizer, config.learning_rate * factor)
        optimizer.zero_grad()
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            loss = training.loss(step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(updates.parameters(), 1.0)
        optimizer.step()
        average.update(updates, step)
        mean_loss += (loss.item() - mean_loss) * (0.05 if mean_loss else 1.0)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(loss=mean_loss, gradient=float(norm))
    average.copy_to(updates)
    return updates.tensors()
