"""Stage 2: the teacher, a flow-matching model with the student's architecture, and its text encoder.

x_t = (1 - t) x0 + t z, target v = z - x0. The embedding takes t in [0, 1] unscaled (the paper's dense time embedding,
3.2). It and QK-norm are there from the start, so that the student begins as an exact copy. The guidance embedder's last
layer is zero and frozen here, and adds nothing until the distillation trains it.

Two measures let training finish in hours on a CPU. Extra output channels predict the image's layout (colour and shape
of each cell), which ties words to positions long before the velocity does; `without_layout` removes them. Forward and
backward run on a compiled bfloat16 replica of the float32 weights.
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

from distill.recipes import Recipe, TeacherStageConfig
from distill.training.latents import Latents, layout_channels
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Ema, Stage, learning_rate_factor, set_learning_rate
from distill.training.text_encoder import Captioner, SmallCaptioner, make_encoder, make_tokenizer
from distill.world.rendering import vocabulary
from engines.models.embeddings import TimeGuidanceEmbed
from engines.models.transformer import SprintTransformer

REPORT_EVERY = 50

Evaluator = Callable[["Teacher", Stage], None]  # scores the averaged weights, and saves a contact sheet


class TextToVelocity(nn.Module):
    """Text encoder and transformer, which train together: token ids in, velocity out."""

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
    """A flow-matching transformer with a guidance embedding of zero, and its captioner."""

    transformer: SprintTransformer
    caption: Captioner


def build(recipe: Recipe) -> tuple[TextToVelocity, SmallCaptioner]:
    """Makes a recipe's untrained teacher with layout channels. Raises ValueError if the recipe lacks this stage."""
    if recipe.teacher is None:
        raise ValueError(f"recipe {recipe.name} trains no teacher; give --teacher DIR_OR_HUB_ID")
    torch.manual_seed(recipe.seed)
    config = recipe.teacher
    tokenizer = make_tokenizer(vocabulary(recipe.world), config.text.max_tokens)
    architecture = config.architecture
    channels = architecture.out_channels + layout_channels(recipe.world)
    transformer = SprintTransformer(replace(architecture, out_channels=channels))
    initialise(transformer)
    encoder = make_encoder(config.text, len(tokenizer))
    return TextToVelocity(encoder, transformer), SmallCaptioner(encoder, tokenizer, config.text.max_tokens)


def initialise(transformer: SprintTransformer) -> None:
    """Zeroes the output layer and the guidance embedding.

    Only the last layer of the embedding is zero: with both, as in diffusers' script, it could not learn.
    """
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    zero_guidance(transformer)


def zero_guidance(transformer: SprintTransformer) -> None:
    """Zeroes the last layer of the guidance embedding, which adds nothing then but can learn."""
    embed = transformer.time_embed
    if not isinstance(embed, TimeGuidanceEmbed):
        raise ValueError("the teacher's architecture has guidance_embeds false; the student needs a place for guidance")
    nn.init.zeros_(embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(embed.guidance_embedder.linear_2.bias)


def shifted_time(count: int, shift: float, device: torch.device) -> Tensor:
    """Draws logit-normal flow times [count], shifted towards 1."""
    t = torch.sigmoid(torch.randn(count, device=device))
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TrainingPhase:
    """A part of the training: the name of its stage, its latents (made only if it runs), steps and rates."""

    name: str
    latents: Callable[[], Latents]
    steps: int
    rate: float  # of the recipe's rates
    decay_fraction: float


class Replica:
    """A bfloat16 copy for the forward and backward pass; the optimiser updates the float32 weights."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.module: nn.Module = accelerator.prepare(deepcopy(model).to(torch.bfloat16))
        self.weights = [p for p in self.module.parameters() if p.requires_grad]

    def gradients_to(self, model: nn.Module) -> None:
        """Moves the gradients to the float32 weights."""
        for copy, weight in zip(self.weights, (p for p in model.parameters() if p.requires_grad), strict=True):
            weight.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None

    @torch.no_grad()
    def weights_from(self, model: nn.Module) -> None:
        """Rounds the float32 weights into the copy."""
        torch._foreach_copy_(self.weights, [p for p in model.parameters() if p.requires_grad])


def train(
    recipe: Recipe, phases: Sequence[TrainingPhase], folder: Path, accelerator: Accelerator, evaluator: Evaluator
) -> Teacher:
    """Trains or resumes all phases, and returns the averaged weights."""
    model, captioner = build(recipe)
    config = recipe.teacher
    assert config is not None
    for phase in phases:
        _fit(phase, config, model, captioner, recipe.seed, folder, accelerator, evaluator)
    return Teacher(without_layout(model.transformer, config.architecture.out_channels), captioner)


def _fit(
    phase: TrainingPhase,
    config: TeacherStageConfig,
    model: TextToVelocity,
    captioner: SmallCaptioner,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    evaluator: Evaluator,
) -> None:
    """Runs one phase and leaves the averaged weights in the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("guidance_embedder" not in name)
    of_blocks, rest = split_parameters(model)
    matrices = Muon(of_blocks, lr=config.matrix_learning_rate)
    others = torch.optim.AdamW(rest, config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = Ema(model, config.ema)
    stage = Stage(
        folder,
        phase.name,
        phase.steps,
        {"model": model, "average": average, "matrices": matrices, "others": others},
        accelerator.is_main_process,
    )
    if stage.resume():
        average.copy_to(model)
        return
    replica = Replica(model, accelerator)
    matrices, others = accelerator.prepare(matrices, others)
    forward = torch.compile(replica.module, dynamic=False) if config.compile else replica.module
    stream = phase.latents().batches(config.batch, seed + 1 + 1000 * accelerator.process_index, stage.step)
    device, channels = accelerator.device, config.architecture.out_channels
    for step in stage:
        batch = next(stream)
        if batch.layouts is None:
            raise ValueError(
                "the teacher stage needs latents with layouts, as distill.training.latents.encode_scenes makes them"
            )
        keep = torch.rand(config.batch) >= config.caption_dropout
        captions = [text if kept else "" for text, kept in zip(batch.captions, keep, strict=True)]
        tokens = captioner.tokens(captions)
        x0, layouts = batch.latents.to(device), batch.layouts.to(device)
        noise, t = torch.randn_like(x0), shifted_time(len(x0), config.time_shift, device)
        weight = t[:, None, None, None]
        factor = phase.rate * learning_rate_factor(step, phase.steps, config.warmup, phase.decay_fraction)
        for optimizer, base in ((matrices, config.matrix_learning_rate), (others, config.learning_rate)):
            set_learning_rate(optimizer, base * factor)
        with sdpa_kernel(SDPBackend.MATH):  # at these lengths 25 % faster than the CPU's flash kernel
            output = forward(((1 - weight) * x0 + weight * noise).bfloat16(), t, tokens.ids, tokens.mask).float()
        fit = F.mse_loss(output[:, :channels], noise - x0)
        layout_fit = F.mse_loss(output[:, channels:], layouts)
        accelerator.backward(fit + config.layout_weight * layout_fit)
        replica.gradients_to(model)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        matrices.step()
        others.step()
        matrices.zero_grad()
        others.zero_grad()
        replica.weights_from(model)
        average.update(model, step)
        if (step + 1) % REPORT_EVERY == 0:
            speed = config.batch * (stage.step + 1) / max(stage.seconds, 1.0)
            stage.report(loss=fit.item(), layout=layout_fit.item(), gradient=float(norm), images_per_second=speed)
        if (step + 1) % config.score_every == 0 and accelerator.is_main_process:
            with average.applied_to(model):
                evaluator(Teacher(without_layout(model.transformer, channels), captioner), stage)
    average.copy_to(model)


def without_layout(trained: SprintTransformer, channels: int) -> SprintTransformer:
    """Returns a copy of the transformer without its layout channels."""
    transformer = SprintTransformer(replace(trained.config, out_channels=channels))
    weights = trained.state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):
        weights[name] = weights[name][:channels]
    transformer.load_state_dict(weights)
    return transformer.eval()
