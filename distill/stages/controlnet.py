"""The ControlNet stage: a branch on a finished, frozen one-step student that follows drawings of the tiny world.

    python -m distill.stages.controlnet --model models/tiny --recipe tiny --out runs/control  # writes .../controlnet

The branch begins as a copy of the student's first blocks with projections of zero. The loss is the squared error of the
clean prediction against the latent of the drawing's image, at the student's angles. Half of the angles are pure noise
(max-time weighting, paper 3.3). Outlines determine nearly all of an image, so the mean that a squared error finds is
sharp, without a teacher of drawings or an adversary. For an empty drawing the target is the student's own prediction.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from distill.objectives import losses
from distill.recipes import RECIPES, ControlStageConfig
from distill.training.checkpoint_writer import write_json, write_weights
from distill.training.latents import CHUNK
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Ema, Stage, learning_rate_factor, save_atomically, set_learning_rate, to_tensor
from distill.world.captions import caption_of
from distill.world.rendering import Scene, World, render, sample_scene
from distill.world.sketches import draw_sketch
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.dcae import Autoencoder
from engines.pipeline.text_stage import TextStage, join, load_text_stage
from engines.sampler import flow_time, input_scale, mix
from engines.types import Pixels

REPORT_EVERY = 50
SHEET = 8
FOLDER = "controlnet"  # of a checkpoint


@dataclass(frozen=True)
class EncodedDrawings:
    """Latents [N,C,h,w] (bfloat16) of images and of their drawings, the latent of an empty drawing, and the scenes."""

    images: Tensor
    drawings: Tensor
    empty: Tensor
    world: World
    seed: int

    def captions(self, rows: list[int], rng: np.random.Generator) -> list[str]:
        """Writes a new caption of each row's scene."""
        return [caption_of(scene_of(self.world, self.seed, row).requirement, rng) for row in rows]


@dataclass(frozen=True)
class Batch:
    """Latents of images and of drawings, text and mask; the first `empty` drawings have no strokes."""

    clean: Tensor
    control: Tensor
    text: Tensor
    mask: Tensor | None
    empty: int


def control_world(world: World) -> World:
    """Returns the world with uniform positions and sizes, so that only the drawing determines them."""
    return replace(
        world,
        single_jitter=0.5,
        single_size=(0.2, 0.72),
        pair_jitter=0.15,
        pair_offset=0.08,
        count_jitter=0.04,
        category_weights=(0.4, 0.12, 0.12, 0.1, 0.16, 0.1),
    )


def scene_of(world: World, seed: int, row: int) -> Scene:
    """Draws the scene of a row from its number alone."""
    return sample_scene(world, np.random.default_rng((seed, row)))


@torch.no_grad()
def encode(autoencoder: Autoencoder, world: World, size: int, count: int, seed: int, path: Path) -> EncodedDrawings:
    """Renders, sketches and encodes `count` scenes, or reads them from `path` if an earlier run saved them."""
    if path.exists():
        cached = torch.load(path, map_location="cpu", weights_only=True)
        if len(cached["pictures"]) == count:
            return EncodedDrawings(cached["pictures"], cached["drawings"], cached["empty"], world, seed)
    device = next(autoencoder.parameters()).device

    def latents(pixels: list[Pixels]) -> Tensor:
        tensor = to_tensor(pixels).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            encoded: Tensor = autoencoder.encoder(tensor)
        return encoded.to("cpu", torch.bfloat16).contiguous()

    chunks: dict[str, list[Tensor]] = {"pictures": [], "drawings": []}
    for first in tqdm(range(0, count, CHUNK), desc="encode", mininterval=5):
        rows = range(first, min(first + CHUNK, count))
        scenes = [scene_of(world, seed, row) for row in rows]
        chunks["pictures"].append(latents([render(world, scene, size) for scene in scenes]))
        generators = [np.random.default_rng((seed, row, 1)) for row in rows]
        sketches = [draw_sketch(scene, size, rng) for scene, rng in zip(scenes, generators, strict=True)]
        chunks["drawings"].append(latents(sketches))
    scale = autoencoder.config.scaling_factor
    state = {name: torch.cat(parts) * scale for name, parts in chunks.items()}
    state["empty"] = latents([np.zeros((size, size, 3), np.uint8)]) * scale
    save_atomically(state, path)
    return EncodedDrawings(state["pictures"], state["drawings"], state["empty"], world, seed)


class ControlTraining:
    """A frozen student, its trained branch, and the loss of a batch."""

    def __init__(self, config: ControlStageConfig, checkpoint: Checkpoint, device: torch.device) -> None:
        self.config = config
        self.guidance = checkpoint.settings.guidance_trained
        self.student = checkpoint.load_transformer(torch.float32, device)
        self.text: TextStage = load_text_stage(checkpoint, torch.float32, device)
        torch.manual_seed(config.seed)
        self.branch = ControlNet.of(self.student, config.copies, config.injection).to(device).train()
        self.controlled = ControlledTransformer(self.student, self.branch)

    def batch(self, drawings: EncodedDrawings, step: int) -> Batch:
        config, device = self.config, self.student.proj_out.weight.device
        rng = np.random.default_rng((config.seed, step))
        rows = rng.integers(0, len(drawings.images), config.batch)
        text, mask = join(self.text.encode(drawings.captions(rows.tolist(), rng)))
        empty = int(rng.binomial(config.batch, config.empty_probability))
        control = drawings.drawings[rows].float()
        control[:empty] = drawings.empty.float()
        return Batch(drawings.images[rows].float().to(device), control.to(device), text.clone(), mask, empty)

    def loss(self, batch: Batch) -> Tensor:
        """Returns the clean prediction's mean squared error, against the student's where the drawing is empty."""
        config, count = self.config, len(batch.clean)
        angle = losses.angles(count, config.mean, config.std)
        angle = losses.with_max_time(angle, config.max_time_probability).to(batch.clean.device)
        low, high = self.guidance
        guidance = self.student.config.guidance_embeds_scale * (low + (high - low) * torch.rand_like(angle))
        time = flow_time(angle)
        column = time[:, None, None, None]
        x = input_scale(time)[:, None, None, None] * mix(batch.clean, torch.randn_like(batch.clean), angle)
        velocity = self.controlled(x, batch.text, time, guidance, batch.mask, batch.control, torch.ones_like(time))
        predicted = x - column * velocity.float()
        target = batch.clean
        if batch.empty:
            e = slice(batch.empty)
            with torch.no_grad():
                mask = None if batch.mask is None else batch.mask[e]
                alone = self.student(x[e], batch.text[e], time[e], guidance[e], mask).float()
                target = torch.cat([x[e] - column[e] * alone, batch.clean[batch.empty :]])
        return F.mse_loss(predicted, target)

    @torch.no_grad()
    def sheet(self, drawings: EncodedDrawings, autoencoder: Autoencoder) -> Tensor:
        """Returns drawings, the images of one step, and the true images: [3 * SHEET,3,H,W]."""
        rng = np.random.default_rng(0)
        rows = list(range(SHEET))
        text, mask = join(self.text.encode(drawings.captions(rows, rng)))
        clean = drawings.images[:SHEET].float().to(text.device)
        time = torch.ones(SHEET, device=text.device)
        guidance = self.student.config.guidance_embeds_scale * torch.full_like(time, sum(self.guidance) / 2)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
        control = drawings.drawings[:SHEET].float().to(text.device)
        predicted = noise - self.controlled(noise, text, time, guidance, mask, control, time).float()
        latents = torch.cat([control, predicted, clean]) / autoencoder.config.scaling_factor
        images: Tensor = autoencoder.decoder(latents)
        return images


def train(
    config: ControlStageConfig, world: World, checkpoint: Checkpoint, folder: Path, accelerator: Accelerator
) -> ControlNet:
    """Trains or resumes the branch and returns it with averaged weights."""
    device = accelerator.device
    autoencoder = checkpoint.load_autoencoder(torch.float32, device)
    size = checkpoint.settings.default_size[0]
    drawings = encode(autoencoder, control_world(world), size, config.images, config.seed, folder / "drawings.pt")
    training = ControlTraining(config, checkpoint, device)
    branch = training.branch
    matrices, others = split_parameters(branch)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "matrices": Muon(matrices, config.matrix_learning_rate),
        "others": torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    }
    rates = {"matrices": config.matrix_learning_rate, "others": config.learning_rate}
    average = Ema(branch, config.ema)
    stage = Stage(
        folder,
        "control",
        config.steps,
        {"branch": branch, "average": average} | optimizers,
        accelerator.is_main_process,
    )
    done = stage.resume()
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    mean_loss = 0.0
    for step in stage if not done else ():
        torch.manual_seed(config.seed + 7919 * step + accelerator.process_index)
        factor = learning_rate_factor(step, config.steps, config.warmup, config.decay_fraction)
        for name, optimizer in optimizers.items():
            set_learning_rate(optimizer, rates[name] * factor)
            optimizer.zero_grad()
        batch = training.batch(drawings, step)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = training.loss(batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(branch.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in optimizers.values():
                optimizer.step()
        average.update(branch, step)
        mean_loss += (loss.item() - mean_loss) * (0.05 if mean_loss else 1.0)
        if (step + 1) % REPORT_EVERY == 0:
            speed = config.batch * (stage.step + 1) / max(stage.seconds, 1.0)
            stage.report(loss=mean_loss, gradient=float(norm), images_per_second=speed)
        if (step + 1) % config.sheet_every == 0:
            with average.applied_to(branch):
                stage.sheet(training.sheet(drawings, autoencoder), SHEET)
    average.copy_to(branch)
    return branch.eval()


def write_controlnet(folder: Path, branch: ControlNet) -> None:
    """Writes the diffusers layout in bfloat16, for engines.checkpoints.controlnet, and overwrites old files."""
    write_json(folder / "config.json", branch.config.to_dict())
    write_weights(folder / "diffusion_pytorch_model.safetensors", branch.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the one-step checkpoint to control")
    parser.add_argument(
        "--recipe", choices=sorted(name for name, make in RECIPES.items() if make().control), required=True
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder; the ControlNet is OUT/controlnet")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.recipe]()
    assert recipe.control is not None
    branch = train(recipe.control, recipe.world, open_checkpoint(arguments.model), arguments.out, Accelerator())
    write_controlnet(arguments.out / FOLDER, branch)


if __name__ == "__main__":
    main()
