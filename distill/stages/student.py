"""Stage 3: the student, an exact copy of the teacher at the start, distilled by sCM and LADD into one to four steps.

Odd steps train the student, even steps the discriminator, in turn (released train_scm_ladd.py; both count as steps).
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
from distill.recipes import DistilStage, Recipe
from distill.stages.teacher import Teacher
from distill.training.latents import Latents
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Average, Stage, learning_rate_factor
from engines.models.transformer import SprintTransformer
from engines.sampler import mix

REPORT_EVERY = 50

Examine = Callable[[SprintTransformer, Stage], None]


class Student(nn.Module):
    """The transformer and the logvar head (adaptive weighting), which is dropped at export."""

    def __init__(self, transformer: SprintTransformer, elements: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.logvar = nn.Linear(transformer.config.dim, 1)
        angles = torch.linspace(0.02, 1.55, 512, device=transformer.proj_out.weight.device)
        self.logvar.to(angles.device)
        with torch.no_grad():  # least squares, from the teacher's embedding of the times
            time = angles.sin() / (angles.sin() + angles.cos())
            _, embedded = transformer.conditioning(time, torch.zeros_like(time))
            rows = torch.cat([embedded.float(), torch.ones_like(time)[:, None]], dim=1)
            ridge = 1e-3 * len(time) * torch.eye(rows.shape[1], device=angles.device)
            wanted = losses.converged_logvar(elements, angles)
            fitted = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)
            self.logvar.weight.copy_(fitted[None, :-1])
            self.logvar.bias.copy_(fitted[-1:])

    def weighting(self, time: Tensor, guidance: Tensor) -> Tensor:
        """logvar [B] from the conditioning embedding of flow time [B] and guidance [B]."""
        _, embedded = self.transformer.conditioning(time, guidance)
        value: Tensor = self.logvar(embedded.detach())[:, 0]
        return value


@dataclass(frozen=True)
class Sample:
    """One batch: clean latents, their noise, guidance [B], text and mask."""

    clean: Tensor
    noise: Tensor
    guidance: Tensor
    text: Tensor
    mask: Tensor
    empty: Tensor
    empty_mask: Tensor


class Distillation:
    """The teacher, the student and what each step computes. Parameters are trained by `train`."""

    def __init__(self, numbers: DistilStage, teacher: Teacher, elements: int) -> None:
        self.numbers = numbers
        self.teacher = teacher
        self.frozen = teacher.transformer.requires_grad_(False).eval()
        self.student = Student(deepcopy(self.frozen).requires_grad_(True), elements)
        self.discriminator = Discriminator(self.frozen, numbers.heads)

    def draw(self, clean: Tensor, captions: Sequence[str]) -> Sample:
        text, mask = self.teacher.caption(captions)
        empty, empty_mask = self.teacher.caption([""] * len(captions))
        choice = torch.tensor(self.numbers.guidance)[torch.randint(len(self.numbers.guidance), (len(captions),))]
        guidance = choice.to(clean.device)
        return Sample(clean, torch.randn_like(clean), guidance, text, mask, empty, empty_mask)

    def network(self, transformer: nn.Module, text: Tensor, mask: Tensor, guidance: Tensor | None) -> Velocity:
        """(x_FM, t_FM) -> v of a transformer with its captions and (scaled) guidance; None: the teacher's zero."""

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            scale = torch.zeros_like(time) if guidance is None else guidance
            output: Tensor = transformer(x, text, time, scale, mask)
            return output.float()

        return velocity

    def student_prediction(self, sample: Sample) -> Velocity:
        """F(x, t) of the student; without the wrap (ablation) the network's answer is taken for F as it is."""
        scaled = self.student.transformer.config.guidance_embeds_scale * sample.guidance
        velocity = self.network(self.student.transformer, sample.text, sample.mask, scaled)
        return as_trigflow(velocity) if self.numbers.flow_to_trigflow else velocity

    def teacher_prediction(self, sample: Sample) -> Velocity:
        """F(x, t) of the guided teacher."""
        with_text = self.network(self.frozen, sample.text, sample.mask, None)
        without = self.network(self.frozen, sample.empty, sample.empty_mask, None)
        return as_trigflow(guided(with_text, without, 1 + self.numbers.guidance_gain * (sample.guidance - 1)))

    def consistency(self, sample: Sample, step: int) -> Tensor:
        """The sCM loss of a batch (paper algorithm 2)."""
        numbers = self.numbers
        angle = losses.angles(len(sample.clean), numbers.student_mean, numbers.student_std).to(sample.clean.device)
        x = mix(sample.clean, sample.noise, angle)
        predict = self.student_prediction(sample)
        with torch.no_grad():
            teacher = self.teacher_prediction(sample)(x, angle)
            speed = angle.cos() * angle.sin()
            along = (speed[:, None, None, None] * teacher, speed)
            frozen, derivative = cast(tuple[Tensor, Tensor], jvp(predict, (x, angle), along))
            warm = min(1.0, (step + 1) / numbers.tangent_warmup)
            g = losses.normalised(losses.tangent(x, angle, frozen, teacher, derivative, warm), numbers.tangent_constant)
        scaled = self.student.transformer.config.guidance_embeds_scale * sample.guidance
        logvar = self.student.weighting(angle.sin() / (angle.sin() + angle.cos()), scaled)
        return losses.scm_loss(predict(x, angle), frozen, g, logvar, angle)

    def generate(self, sample: Sample) -> Tensor:
        """One-step pictures of the student from a random angle or, half of the time, from noise alone."""
        numbers = self.numbers
        angle = losses.angles(len(sample.clean), numbers.student_mean, numbers.student_std).to(sample.clean.device)
        angle = losses.with_max_time(angle, numbers.max_time_probability)
        noise = torch.randn_like(sample.clean)
        x = mix(sample.clean, noise, angle)
        prediction = self.student_prediction(sample)(x, angle)
        column = angle[:, None, None, None]
        return column.cos() * x - column.sin() * prediction

    def judged(self, clean: Tensor, sample: Sample, shift: int = 0) -> Tensor:
        """The discriminator's logits; `shift` rolls pictures against captions (misaligned pairs count as fakes)."""
        numbers = self.numbers
        angle = losses.angles(len(clean), numbers.discriminator_mean, numbers.discriminator_std).to(clean.device)
        logits: Tensor = self.discriminator(
            clean.roll(shift, 0), torch.randn_like(clean), angle, sample.text, sample.mask
        )
        return logits

    def student_loss(self, sample: Sample, step: int, adversarial: bool) -> dict[str, Tensor]:
        """The weighted parts of the student's loss."""
        numbers, parts = self.numbers, {}
        if numbers.scm_weight:
            parts["scm"] = numbers.scm_weight * self.consistency(sample, step)
        if adversarial:
            fake = self.judged(self.generate(sample), sample)
            parts["adversarial"] = numbers.adversarial_weight * losses.hinge_generator(fake)
        return parts

    def discriminator_loss(self, sample: Sample) -> Tensor:
        with torch.no_grad():
            fake = self.generate(sample)
        real = self.judged(sample.clean, sample)
        fakes = torch.cat([self.judged(fake, sample), self.judged(sample.clean, sample, shift=1)])
        return losses.hinge_discriminator(real, fakes)


def train(
    recipe: Recipe, teacher: Teacher, latents: Latents, folder: Path, accelerator: Accelerator, examine: Examine
) -> SprintTransformer:
    """Trains or resumes; returns the averaged student."""
    numbers = recipe.distil
    torch.manual_seed(numbers.seed)
    work = Distillation(numbers, teacher, int(np.prod(latents.values.shape[1:])))
    student, heads = work.student, work.discriminator
    matrices, others = split_parameters(student)
    if numbers.matrix_learning_rate is None:
        matrices, others = [], matrices + others
    rates: dict[str, float] = {"optimizer": numbers.learning_rate}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(others, numbers.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    }
    if numbers.matrix_learning_rate is not None:
        rates["matrices"] = numbers.matrix_learning_rate
        optimizers["matrices"] = Muon(matrices, numbers.matrix_learning_rate)
    judge = torch.optim.AdamW(heads.parameters(), numbers.discriminator_learning_rate, betas=(0.0, 0.99))
    average = Average(student, numbers.ema)
    parts = {"student": student, "heads": heads, "judge": judge, "average": average} | optimizers
    stage = Stage(folder, "student", numbers.steps, parts, accelerator.is_main_process)
    done = stage.resume()
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    judge = accelerator.prepare(judge)
    stream = latents.batches(numbers.batch, recipe.seed + 2 + 1000 * accelerator.process_index, stage.step)
    device = accelerator.device
    seen: dict[str, float] = {}
    for step in stage if not done else ():
        if numbers.seconds is not None and stage.seconds >= numbers.seconds:
            stage.save()
            break
        torch.manual_seed(numbers.seed + 7919 * step + accelerator.process_index)
        batch = next(stream)
        factor = learning_rate_factor(step, numbers.steps, numbers.warmup, numbers.decay_fraction)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor
        adversarial = numbers.adversarial_weight > 0 and step >= numbers.adversarial_from
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            sample = work.draw(batch.latents.to(device), batch.captions)
            judging = adversarial and step % numbers.adversarial_every == numbers.adversarial_every - 1
            if judging:
                loss = work.discriminator_loss(sample)
                seen["discriminator"] = loss.item()
            else:
                losses_by_part = work.student_loss(sample, step, adversarial)
                loss = torch.stack(list(losses_by_part.values())).sum()
                seen |= {name: part.item() for name, part in losses_by_part.items()}
        for optimizer in (judge, *optimizers.values()):
            optimizer.zero_grad()
        accelerator.backward(loss)
        trained = heads if judging else student
        norm = accelerator.clip_grad_norm_(trained.parameters(), numbers.gradient_clip)
        if torch.isfinite(norm):  # upstream skips such steps too
            for optimizer in (judge,) if judging else optimizers.values():
                optimizer.step()
        if not judging:
            average.update(student, step)
            seen["gradient"] = float(norm)
        if (step + 1) % REPORT_EVERY == 0:
            stage.report(**seen)
        if (step + 1) % numbers.score_every == 0 and accelerator.is_main_process:
            with average.applied_to(student):
                examine(student.transformer, stage)
    average.copy_to(student)
    return student.transformer.eval()
