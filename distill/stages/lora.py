"""The LoRA stage: low-rank updates of a finished, frozen student that teach it one more shape.

The text encoder does not know the shape's name and encodes all unknown words as one token. The updates learn to draw
the shape for this token, from the targets of distill.stages.lora_targets. For captions without the shape the target is
the student's own prediction.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.objectives import losses
from distill.recipes import LoraStageConfig
from distill.stages.lora_targets import BaseStudent, base_targets, replaced_targets
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate
from distill.world.scenes import World
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import join
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


def with_shape(world: World, shape: str) -> World:
    """Returns the world with one more shape."""
    return replace(world, shapes=(*world.shapes, shape))


class LoraTraining:
    """The student with its updates, the student before, the targets, and the loss of a batch."""

    def __init__(
        self, config: LoraStageConfig, checkpoint: Checkpoint, world: World, folder: Path, device: torch.device
    ) -> None:
        self.config, self.base = config, BaseStudent.load(checkpoint, device)
        self.student = checkpoint.load_transformer(torch.float32, device)
        torch.manual_seed(config.seed)
        self.updates = LowRankUpdates(self.student, config.rank).to(device)
        wider = with_shape(world, config.shape)
        self.new = replaced_targets(
            self.base, wider, config.shape, config.images, config.seed, folder / f"{config.shape}.pt"
        )
        self.old = base_targets(self.base, world, config.images, config.seed, folder / "base.pt")

    def loss(self, step: int) -> Tensor:
        """Returns the clean prediction's mean squared error, against the student's for captions without the shape.

        At the largest angle a target with the shape belongs to its own noise; all other noise is new.
        """
        config, rng = self.config, np.random.default_rng((self.config.seed, step))
        old = round(config.batch * config.old_fraction)
        parts = [(self.old, rng.integers(0, len(self.old.captions), old))]
        parts += [(self.new, rng.integers(0, len(self.new.captions), config.batch - old))]
        text, mask = join(self.base.text.encode([part.captions[row] for part, rows in parts for row in rows]))
        device = text.device
        clean, noise, guidance = (
            torch.cat([getattr(part, name)[torch.from_numpy(rows)] for part, rows in parts]).to(device)
            for name in ("latents", "noise", "guidance")
        )
        angle = losses.angles(config.batch, config.mean, config.std)
        angle = losses.with_max_time(angle, config.max_time_probability).to(device)
        own = (angle == losses.MAX_ANGLE) & (torch.arange(config.batch, device=device) >= old)
        noise = torch.where(own[:, None, None, None], noise, torch.randn_like(noise))
        time = flow_time(angle)
        column = time[:, None, None, None]
        x = input_scale(time)[:, None, None, None] * mix(clean, noise, angle)
        inputs = (x, text.clone(), time, guidance, mask)
        predicted = x - column * self.student(*inputs).float()
        if old:
            first = [None if value is None else value[:old] for value in inputs]
            with torch.no_grad():
                before: Tensor = x[:old] - column[:old] * self.base.transformer(*first).float()
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
