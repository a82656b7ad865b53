"""The LoRA stage: low-rank additions to a finished student that teach it one shape more; the student stays as it is.

The shape's name is a word that the text encoder does not know: all such words are one token to it, and the additions
learn to draw the shape for that token. Pictures come from a world whose things stand at fixed places, so that the mean
which a squared error finds is a sharp picture (as in distill.stages.controlnet). Captions without the shape are held to
what the student says of them alone.
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
from distill.recipes import LoraStage
from distill.training.latents import CHUNK
from distill.training.stage import Average, Stage, learning_rate_factor, to_tensor
from distill.world.rendering import Scene, World, caption, render, sample_scene
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import TextStage, join, load_text_stage
from engines.sampler import flow_time, input_scale, mix

REPORT_EVERY = 20


class Addition(nn.Module):
    """A parametrization of a weight [out, in] or [out, in, 1, 1]: up @ down is added to it, zero at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inputs = weight.shape[:2]
        self.down = nn.Parameter(nn.init.normal_(torch.empty(rank, inputs), std=inputs**-0.5))
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class Additions(nn.Module):
    """Of every linear map and 1x1 convolution that reads text or works on tokens, by the name of the module."""

    def __init__(self, transformer: SprintTransformer, rank: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.parts = nn.ModuleList()
        for name, module in transformer.named_modules():
            if name.startswith(("transformer_blocks.", "caption_projection.")) and is_target(module):
                self.names.append(name)
                self.parts.append(Addition(cast(Tensor, module.weight), rank))
        for name, part in zip(self.names, self.parts, strict=True):
            parametrize.register_parametrization(transformer.get_submodule(name), "weight", part)

    def tensors(self) -> dict[str, Tensor]:
        """Under the keys that diffusers' SanaLoraLoaderMixin reads; alpha is the rank, so that nothing is scaled."""
        found = {}
        for name, part in zip(self.names, cast(list[Addition], list(self.parts)), strict=True):
            found[f"transformer.{name}.lora_A.weight"] = part.down.detach()
            found[f"transformer.{name}.lora_B.weight"] = part.up.detach()
        return found


def is_target(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


@dataclass(frozen=True)
class Pictures:
    """Latents [N,C,h,w] and the scenes that they are of."""

    latents: Tensor
    scenes: list[Scene]


def wider(world: World, shape: str) -> World:
    """`world` with one shape more."""
    return replace(world, shapes=(*world.shapes, shape))


def still(world: World) -> World:
    """`world` with everything in the middle of where it may be."""
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


def scenes(world: World, shape: str, count: int, seed: int) -> list[Scene]:
    """Scenes of the training split in which one thing at least has the shape."""

    def endless() -> Iterator[Scene]:
        rng = np.random.default_rng(seed)
        while True:
            scene = sample_scene(world, rng)
            if any(thing.shape == shape for thing in scene.things):
                yield scene

    return [scene for _, scene in zip(range(count), endless(), strict=False)]


@torch.no_grad()
def encode(autoencoder: Autoencoder, drawn: list[Scene], world: World, size: int, path: Path) -> Pictures:
    """Draws and encodes, or reads `path`, where an earlier run left them."""
    if path.exists():
        kept: Tensor = torch.load(path, map_location="cpu", weights_only=True)
        if len(kept) == len(drawn):
            return Pictures(kept, drawn)
    device, found = next(autoencoder.parameters()).device, []
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
    for first in tqdm(range(0, len(drawn), CHUNK), desc="encode", mininterval=5):
        pixels = to_tensor(np.stack([render(world, scene, size) for scene in drawn[first : first + CHUNK]]))
        with torch.autocast(device.type, torch.bfloat16):
            found.append(autoencoder.encoder(pixels.to(device, memory_format=torch.channels_last)).float())
    latents = (torch.cat(found) * autoencoder.config.scaling_factor).cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    torch.save(latents, aside)
    aside.replace(path)
    return Pictures(latents, drawn)


class Lesson:
    """The student, its additions, what it was, and the loss of a batch."""

    def __init__(
        self, numbers: LoraStage, checkpoint: Checkpoint, world: World, folder: Path, device: torch.device
    ) -> None:
        self.numbers, self.world = numbers, wider(world, numbers.shape)
        self.guidance = checkpoint.settings.guidance_trained
        self.before = checkpoint.load_transformer(torch.float32, device)
        self.student = checkpoint.load_transformer(torch.float32, device)
        torch.manual_seed(numbers.seed)
        self.additions = Additions(self.student, numbers.rank).to(device)
        self.text: TextStage = load_text_stage(checkpoint, torch.float32, device)
        autoencoder, size = checkpoint.load_autoencoder(torch.float32, device), checkpoint.settings.default_size[0]
        new = scenes(still(self.world), numbers.shape, numbers.pictures, numbers.seed)
        rng = np.random.default_rng((numbers.seed, 1))
        old = [sample_scene(world, rng) for _ in range(max(1, numbers.pictures // 2))]
        self.new, self.old = (
            encode(autoencoder, drawn, self.world, size, folder / f"{name}.pt")
            for name, drawn in (("new", new), ("old", old))
        )

    def loss(self, step: int) -> Tensor:
        """Mean squared error of the clean prediction: against the picture, or without the shape against the student."""
        numbers, rng = self.numbers, np.random.default_rng((self.numbers.seed, step))
        kept = round(numbers.batch * numbers.old_fraction)
        rows = [(self.old, int(row)) for row in rng.integers(0, len(self.old.scenes), kept)]
        rows += [(self.new, int(row)) for row in rng.integers(0, len(self.new.scenes), numbers.batch - kept)]
        text, mask = join(self.text.encode([caption(self.world, kind.scenes[row], rng) for kind, row in rows]))
        clean = torch.stack([kind.latents[row] for kind, row in rows]).to(text.device)
        angle = losses.angles(len(rows), numbers.mean, numbers.std)
        angle = losses.with_max_time(angle, numbers.max_time_probability).to(clean.device)
        low, high = self.guidance
        guidance = self.student.config.guidance_embeds_scale * (low + (high - low) * torch.rand_like(angle))
        time = flow_time(angle)
        column = time[:, None, None, None]
        x = input_scale(time)[:, None, None, None] * mix(clean, torch.randn_like(clean), angle)
        inputs = (x, text.clone(), time, guidance, mask)
        predicted = x - column * self.student(*inputs).float()
        if kept:
            first = [None if value is None else value[:kept] for value in inputs]
            with torch.no_grad():
                before: Tensor = x[:kept] - column[:kept] * self.before(*first).float()
            clean = torch.cat([before, clean[kept:]])
        return F.mse_loss(predicted, clean)


def train(
    numbers: LoraStage, world: World, checkpoint: Checkpoint, folder: Path, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Trains or resumes; returns the averaged additions under diffusers' keys."""
    work = Lesson(numbers, checkpoint, world, folder, accelerator.device)
    additions = work.additions
    optimizer: Any = torch.optim.AdamW(
        additions.parameters(), numbers.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    average = Average(additions, numbers.ema)
    parts = {"additions": additions, "average": average, "optimizer": optimizer}
    stage = Stage(folder, "lora", numbers.steps, parts, accelerator.is_main_process)
    done = stage.resume()
    optimizer = accelerator.prepare(optimizer)
    seen = 0.0
    for step in stage if not done else ():
        torch.manual_seed(numbers.seed + 7919 * step)
        factor = learning_rate_factor(step, numbers.steps, numbers.warmup, numbers.decay_fraction)
        for group in optimizer.param_groups:
            group["lr"] = numbers.learning_rate * factor
        optimizer.zero_grad()
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            loss = work.loss(step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(additions.parameters(), 1.0)
        optimizer.step()
        average.update(additions, step)
        seen += (loss.item() - seen) * (0.05 if seen else 1.0)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(loss=seen, gradient=float(norm))
    average.copy_to(additions)
    return additions.tensors()
