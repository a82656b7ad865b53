"""Stage 3: the student, which begins as an exact copy of the teacher and learns one to four steps by sCM and LADD.

Student and discriminator train in turn, and each counts as a step (released train_scm_ladd.py).
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.objectives import losses
from distill.objectives.discriminator import Discriminator
from distill.objectives.trigflow import Velocity, as_trigflow, guided
from distill.recipes import DistilStageConfig, Recipe
from distill.stages.teacher import Teacher
from distill.training.latents import Latents
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate
from engines.models.transformer import SprintTransformer
from engines.sampler import mix

REPORT_EVERY = 50

Evaluator = Callable[[SprintTransformer, Stage], None]


class Student(nn.Module):
    """The transformer and the logvar head (adaptive weighting), which the checkpoint leaves out."""

    def __init__(self, transformer: SprintTransformer, elements: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.logvar = nn.Linear(transformer.config.dim, 1)
        angles = torch.linspace(0.02, 1.55, 512, device=transformer.proj_out.weight.device)
        self.logvar.to(angles.device)
        with torch.no_grad():  # least squares from the teacher's embedding of the times
            time = angles.sin() / (angles.sin() + angles.cos())
            _, embedded = transformer.conditioning(time, torch.zeros_like(time))
            rows = torch.cat([embedded.float(), torch.ones_like(time)[:, None]], dim=1)
            ridge = 1e-3 * len(time) * torch.eye(rows.shape[1], device=angles.device)
            target = losses.converged_logvar(elements, angles)
            fitted = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ target)
            self.logvar.weight.copy_(fitted[None, :-1])
            self.logvar.bias.copy_(fitted[-1:])

    def weighting(self, time: Tensor, guidance: Tensor) -> Tensor:
        """Returns logvar [B] from the conditioning embedding of flow time [B] and guidance [B]."""
        _, embedded = self.transformer.conditioning(time, guidance)
        value: Tensor = self.logvar(embedded.detach())[:, 0]
        return value


@dataclass(frozen=True)
class StudentBatch:
    """Clean latents, their noise, guidance [B], text and mask of the captions and of empty captions."""

    clean: Tensor
    noise: Tensor
    guidance: Tensor
    text: Tensor
    mask: Tensor
    empty: Tensor
    empty_mask: Tensor


class Distillation:
    """Teacher, student and discriminator, and the losses of a step. `train` updates the parameters."""

    def __init__(self, config: DistilStageConfig, teacher: Teacher, elements: int) -> None:
        self.config = config
        self.teacher = teacher
        self.frozen = teacher.transformer.requires_grad_(False).eval()
        self.student = Student(deepcopy(self.frozen).requires_grad_(True), elements)
        self.discriminator = Discriminator(self.frozen, config.heads)

    def make_batch(self, clean: Tensor, captions: Sequence[str]) -> StudentBatch:
        text, mask = self.teacher.caption(captions)
        empty, empty_mask = self.teacher.caption([""] * len(captions))
        choice = torch.tensor(self.config.guidance)[torch.randint(len(self.config.guidance), (len(captions),))]
        guidance = choice.to(clean.device)
        return StudentBatch(clean, torch.randn_like(clean), guidance, text, mask, empty, empty_mask)

    def network(self, transformer: nn.Module, text: Tensor, mask: Tensor, guidance: Tensor | None) -> Velocity:
        """Returns (x_FM, t_FM) -> v of a transformer with captions and scaled guidance; None is the teacher's zero."""

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            scale = torch.zeros_like(time) if guidance is None else guidance
            output: Tensor = transformer(x, text, time, scale, mask)
            return output.float()

        return velocity

    def student_prediction(self, batch: StudentBatch) -> Velocity:
        """Returns F(x, t) of the student; without the wrap (ablation) the network predicts F itself."""
        scaled = self.student.transformer.config.guidance_embeds_scale * batch.guidance
        velocity = self.network(self.student.transformer, batch.text, batch.mask, scaled)
        return as_trigflow(velocity) if self.config.flow_to_trigflow else velocity

    def teacher_prediction(self, batch: StudentBatch) -> Velocity:
        """Returns F(x, t) of the guided teacher."""
        with_text = self.network(self.frozen, batch.text, batch.mask, None)
        without = self.network(self.frozen, batch.empty, batch.empty_mask, None)
        return as_trigflow(guided(with_text, without, 1 + self.config.guidance_gain * (batch.guidance - 1)))

    def consistency(self, batch: StudentBatch, step: int) -> Tensor:
        """Returns the sCM loss of a batch (paper algorithm 2)."""
        config = self.config
        angle = losses.angles(len(batch.clean), config.student_mean, config.student_std).to(batch.clean.device)
        x = mix(batch.clean, batch.noise, angle)
        predict = self.student_prediction(batch)
        with torch.no_grad():
            teacher = self.teacher_prediction(batch)(x, angle)
            speed = angle.cos() * angle.sin()
            along = (speed[:, None, None, None] * teacher, speed)
            frozen, derivative = cast(tuple[Tensor, Tensor], jvp(predict, (x, angle), along))
            warm = min(1.0, (step + 1) / config.tangent_warmup)
            g = losses.normalised(losses.tangent(x, angle, frozen, teacher, derivative, warm), config.tangent_constant)
        scaled = self.student.transformer.config.guidance_embeds_scale * batch.guidance
        logvar = self.student.weighting(angle.sin() / (angle.sin() + angle.cos()), scaled)
        return losses.scm_loss(predict(x, angle), frozen, g, logvar, angle)

    def generate(self, batch: StudentBatch) -> Tensor:
        """Returns the student's one-step latents from a random angle or, half of the time, from pure noise."""
        config = self.config
        angle = losses.angles(len(batch.clean), config.student_mean, config.student_std).to(batch.clean.device)
        angle = losses.with_max_time(angle, config.max_time_probability)
        noise = torch.randn_like(batch.clean)
        x = mix(batch.clean, noise, angle)
        prediction = self.student_prediction(batch)(x, angle)
        column = angle[:, None, None, None]
        return column.cos() * x - column.sin() * prediction

    def discriminator_logits(self, clean: Tensor, batch: StudentBatch, shift: int = 0) -> Tensor:
        """Returns the discriminator's logits; `shift` misaligns images and captions for more fakes."""
        config = self.config
        angle = losses.angles(len(clean), config.discriminator_mean, config.discriminator_std).to(clean.device)
        logits: Tensor = self.discriminator(
            clean.roll(shift, 0), torch.randn_like(clean), angle, batch.text, batch.mask
        )
        return logits

    def student_loss(self, batch: StudentBatch, step: int, adversarial: bool) -> dict[str, Tensor]:
        """Returns the weighted parts of the student's loss."""
        config, parts = self.config, {}
        if config.scm_weight:
            parts["scm"] = config.scm_weight * self.consistency(batch, step)
        if adversarial:
            fake = self.discriminator_logits(self.generate(batch), batch)
            parts["adversarial"] = config.adversarial_weight * losses.hinge_generator(fake)
        return parts

    def discriminator_loss(self, batch: StudentBatch) -> Tensor:
        with torch.no_grad():
            fake = self.generate(batch)
        real = self.discriminator_logits(batch.clean, batch)
        misaligned = self.discriminator_logits(batch.clean, batch, shift=1)
        fakes = torch.cat([self.discriminator_logits(fake, batch), misaligned])
        return losses.hinge_discriminator(real, fakes)


def train(
    recipe: Recipe, teacher: Teacher, latents: Latents, folder: Path, accelerator: Accelerator, evaluator: Evaluator
) -> SprintTransformer:
    """Trains or resumes, and returns the averaged student."""
    config = recipe.distil
    torch.manual_seed(config.seed)
    distillation = Distillation(config, teacher, int(np.prod(latents.values.shape[1:])))
    student, heads = distillation.student, distillation.discriminator
    matrices, others = split_parameters(student)
    if config.matrix_learning_rate is None:
        matrices, others = [], matrices + others
    rates: dict[str, float] = {"optimizer": config.learning_rate}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    }
    if config.matrix_learning_rate is not None:
        rates["matrices"] = config.matrix_learning_rate
        optimizers["matrices"] = Muon(matrices, config.matrix_learning_rate)
    heads_optimizer = torch.optim.AdamW(heads.parameters(), config.discriminator_learning_rate, betas=(0.0, 0.99))
    average = Ema(student, config.ema)
    parts = {"student": student, "heads": heads, "judge": heads_optimizer, "average": average} | optimizers
    stage = Stage(folder, "student", config.steps, parts, accelerator.is_main_process)
    done = stage.resume()
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    heads_optimizer = accelerator.prepare(heads_optimizer)
    stream = latents.batches(config.batch, recipe.seed + 2 + 1000 * accelerator.process_index, stage.step)
    device = accelerator.device
    metrics: dict[str, float] = {}
    for step in stage if not done else ():
        torch.manual_seed(config.seed + 7919 * step + accelerator.process_index)
        encoded = next(stream)
        factor = learning_rate_factor(step, config.steps, config.warmup, config.decay_fraction)
        for name, optimizer in optimizers.items():
            set_learning_rate(optimizer, rates[name] * factor)
        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_from
        with torch.autocast(device.type, torch.bfloat16, config.bfloat16), sdpa_kernel(SDPBackend.MATH):
            batch = distillation.make_batch(encoded.latents.to(device), encoded.captions)
            discriminating = adversarial and step % config.adversarial_every == config.adversarial_every - 1
            if discriminating:
                loss = distillation.discriminator_loss(batch)
                metrics["discriminator"] = loss.item()
            else:
                losses_by_part = distillation.student_loss(batch, step, adversarial)
                loss = torch.stack(list(losses_by_part.values())).sum()
                metrics |= {name: part.item() for name, part in losses_by_part.items()}
        for optimizer in (heads_optimizer, *optimizers.values()):
            optimizer.zero_grad()
        accelerator.backward(loss)
        trained = heads if discriminating else student
        norm = accelerator.clip_grad_norm_(trained.parameters(), config.gradient_clip)
        if torch.isfinite(norm):  # upstream skips such steps too
            for optimizer in (heads_optimizer,) if discriminating else optimizers.values():
                optimizer.step()
        if not discriminating:
            average.update(student, step)
            metrics["gradient"] = float(norm)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(**metrics)
        if (step + 1) % config.score_every == 0 and accelerator.is_main_process:
            with average.applied_to(student):
                evaluator(student.transformer, stage)
    average.copy_to(student)
    return student.transformer.eval()
