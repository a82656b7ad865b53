"""Stage 2: the teacher, a flow-matching model with the student's architecture, and the text encoder beside it.

x_t = (1 - t) x0 + t z, target v = z - x0, t in [0, 1] embedded as it is (the paper's dense time embedding, 3.2) and
QK-norm from the start, so that the student begins as an exact copy. The guidance embedder's last layer is zero and
frozen here: it adds nothing until the distillation trains it.

Two things make hours on a CPU enough. Extra output channels predict the picture's layout (which colour and shape
covers each cell), which ties words to places long before the velocity does; `without_layout` cuts them off. And the
passes run on a bfloat16 replica, compiled, beside float32 master weights.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma2 import Gemma2Model

from distill.recipes import Recipe, TeacherStage
from distill.training.latents import Latents, layout_channels
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Average, Stage, learning_rate_factor
from distill.training.text_encoder import Captioner, SmallCaptioner, make_encoder, make_tokenizer
from distill.world.rendering import vocabulary
from engines.models.embeddings import TimeGuidanceEmbed
from engines.models.transformer import SprintTransformer

REPORT_EVERY = 50

Examine = Callable[["Teacher", Stage], None]  # looks at the averaged weights: sample sheet and score


class TextToVelocity(nn.Module):
    """Words in, velocity out: what is trained together."""

    def __init__(self, encoder: Gemma2Model, transformer: SprintTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.transformer = transformer

    def forward(self, latent: Tensor, time: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        velocity: Tensor = self.transformer(latent, text, time, torch.zeros_like(time), mask)
        return velocity


@dataclass(frozen=True)
class Teacher:
    """A flow-matching transformer with a silent guidance embedding, and how it reads captions."""

    transformer: SprintTransformer
    caption: Captioner


def build(recipe: Recipe) -> tuple[TextToVelocity, SmallCaptioner]:
    """The untrained teacher, layout channels included, of a recipe that has this stage."""
    if recipe.teacher is None:
        raise ValueError(f"recipe {recipe.name} trains no teacher; give --teacher DIR_OR_HUB_ID")
    torch.manual_seed(recipe.seed)
    numbers = recipe.teacher
    tokenizer = make_tokenizer(vocabulary(recipe.world), numbers.text.max_tokens)
    architecture = numbers.architecture
    channels = architecture.out_channels + layout_channels(recipe.world)
    transformer = SprintTransformer(replace(architecture, out_channels=channels))
    initialise(transformer)
    encoder = make_encoder(numbers.text, len(tokenizer))
    return TextToVelocity(encoder, transformer), SmallCaptioner(encoder, tokenizer, numbers.text.max_tokens)


def initialise(transformer: SprintTransformer) -> None:
    """Zero output, zero guidance embedding (its last layer only: diffusers' script zeroes both and kills it)."""
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    silence_guidance(transformer)


def silence_guidance(transformer: SprintTransformer) -> None:
    """Makes the guidance embedding add nothing, and keeps it able to learn."""
    embed = transformer.time_embed
    if not isinstance(embed, TimeGuidanceEmbed):
        raise ValueError("the teacher's architecture has guidance_embeds false; the student needs a place for guidance")
    nn.init.zeros_(embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(embed.guidance_embedder.linear_2.bias)


def shifted_time(count: int, shift: float, device: torch.device) -> Tensor:
    """Logit-normal flow times [count], moved towards 1 by `shift`."""
    t = torch.sigmoid(torch.randn(count, device=device))
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Lesson:
    """A part of the training: its stage's name, which latents (made only when it has to run), how long, how fast."""

    name: str
    latents: Callable[[], Latents]
    steps: int
    rate: float  # of the recipe's rates
    decay_fraction: float


class Replica:
    """A bfloat16 copy that runs the passes; the float32 weights it copies are the ones that are optimised."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.module: nn.Module = accelerator.prepare(deepcopy(model).to(torch.bfloat16))
        self.weights = [p for p in self.module.parameters() if p.requires_grad]

    def gradients_to(self, model: nn.Module) -> None:
        """Moves the gradients to the float32 weights."""
        for mine, theirs in zip(self.weights, (p for p in model.parameters() if p.requires_grad), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.float()
            mine.grad = None

    @torch.no_grad()
    def weights_from(self, model: nn.Module) -> None:
        """Rounds the float32 weights into the copy."""
        torch._foreach_copy_(self.weights, [p for p in model.parameters() if p.requires_grad])


def train(
    recipe: Recipe, lessons: Sequence[Lesson], folder: Path, accelerator: Accelerator, examine: Examine
) -> Teacher:
    """Trains or resumes, lesson after lesson; returns the averaged weights."""
    model, captioner = build(recipe)
    numbers = recipe.teacher
    assert numbers is not None
    for lesson in lessons:
        _fit(lesson, numbers, model, captioner, recipe.seed, folder, accelerator, examine)
    return Teacher(without_layout(model.transformer, numbers.architecture.out_channels), captioner)


def _fit(
    lesson: Lesson,
    numbers: TeacherStage,
    model: TextToVelocity,
    captioner: SmallCaptioner,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    examine: Examine,
) -> None:
    """One lesson. Leaves the averaged weights in the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("guidance_embedder" not in name)
    of_blocks, rest = split_parameters(model)
    matrices = Muon(of_blocks, lr=numbers.matrix_learning_rate)
    others = torch.optim.AdamW(rest, numbers.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = Average(model, numbers.ema)
    stage = Stage(
        folder,
        lesson.name,
        lesson.steps,
        {"model": model, "average": average, "matrices": matrices, "others": others},
        accelerator.is_main_process,
    )
    if stage.resume():
        average.copy_to(model)
        return
    replica = Replica(model, accelerator)
    matrices, others = accelerator.prepare(matrices, others)
    forward = torch.compile(replica.module, dynamic=False) if numbers.compile else replica.module
    stream = lesson.latents().batches(numbers.batch, seed + 1 + 1000 * accelerator.process_index, stage.step)
    device, channels = accelerator.device, numbers.architecture.out_channels
    for step in stage:
        batch = next(stream)
        if batch.layouts is None:
            raise ValueError(
                "the teacher stage needs latents with layouts, as distill.training.latents.encode_scenes makes them"
            )
        keep = torch.rand(numbers.batch) >= numbers.caption_dropout
        words = captioner.words([text if kept else "" for text, kept in zip(batch.captions, keep, strict=True)])
        x0, layouts = batch.latents.to(device), batch.layouts.to(device)
        noise, t = torch.randn_like(x0), shifted_time(len(x0), numbers.time_shift, device)
        weight = t[:, None, None, None]
        factor = lesson.rate * learning_rate_factor(step, lesson.steps, numbers.warmup, lesson.decay_fraction)
        for optimizer, base in ((matrices, numbers.matrix_learning_rate), (others, numbers.learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        with sdpa_kernel(SDPBackend.MATH):  # at these lengths 25 % faster than the CPU's flash kernel
            output = forward(((1 - weight) * x0 + weight * noise).bfloat16(), t, words.ids, words.mask).float()
        fit = F.mse_loss(output[:, :channels], noise - x0)
        layout_fit = F.mse_loss(output[:, channels:], layouts)
        accelerator.backward(fit + numbers.layout_weight * layout_fit)
        replica.gradients_to(model)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        matrices.step()
        others.step()
        matrices.zero_grad()
        others.zero_grad()
        replica.weights_from(model)
        average.update(model, step)
        if (step + 1) % REPORT_EVERY == 0:
            speed = numbers.batch * (stage.step + 1) / max(stage.seconds, 1.0)
            stage.report(loss=fit.item(), layout=layout_fit.item(), gradient=float(norm), images_per_second=speed)
        if (step + 1) % numbers.score_every == 0 and accelerator.is_main_process:
            with average.applied_to(model):
                examine(Teacher(without_layout(model.transformer, channels), captioner), stage)
    average.copy_to(model)


def without_layout(trained: SprintTransformer, channels: int) -> SprintTransformer:
    """A copy of the transformer without its layout channels."""
    transformer = SprintTransformer(replace(trained.config, out_channels=channels))
    weights = trained.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):
        weights[name] = weights[name][:channels]
    transformer.load_state_dict(weights)
    return transformer.eval()
