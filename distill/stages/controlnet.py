"""The ControlNet stage: drawings of the tiny world steer a finished one-step student, which stays as it is.

    python -m distill.stages.controlnet --model models/tiny --recipe tiny --out runs/control  # writes .../controlnet

The branch begins as a copy of the student's first blocks with projections of zero. One step from noise has to land on
the picture whose outlines were drawn: at the student's own angles, half of them pure noise (max-time weighting, paper
3.3), its clean prediction is held to the picture's latent. With the outlines given, hardly anything is left open, so
the mean that a squared error finds is a sharp picture, and neither a teacher of drawings nor an adversary is needed.
Without strokes the branch must add nothing: an empty drawing is held to what the student says alone.
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
from distill.recipes import RECIPES, ControlStage
from distill.training.checkpoint_writer import write_json, write_weights
from distill.training.latents import CHUNK
from distill.training.muon import Muon, split_parameters
from distill.training.stage import Average, Stage, learning_rate_factor, to_tensor
from distill.world.rendering import Scene, World, caption, render, sample_scene
from distill.world.sketches import draw
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
class Drawings:
    """Latents of pictures and of their drawings, both [N,C,h,w] bfloat16, that of an empty drawing, and the scenes."""

    pictures: Tensor
    drawings: Tensor
    empty: Tensor
    world: World
    seed: int

    def captions(self, rows: list[int], rng: np.random.Generator) -> list[str]:
        """A caption of each row's scene, phrased anew."""
        return [caption(self.world, scene_of(self.world, self.seed, row), rng) for row in rows]


@dataclass(frozen=True)
class Batch:
    """Clean latents, those of the drawings, text and mask; the first `empty` drawings hold no stroke."""

    clean: Tensor
    control: Tensor
    text: Tensor
    mask: Tensor | None
    empty: int


def control_world(world: World) -> World:
    """The same things at any place and of any size: where they are is for the drawing to say, not for habit."""
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
    """The scene of a row, from its number alone."""
    return sample_scene(world, np.random.default_rng((seed, row)))


@torch.no_grad()
def encode(autoencoder: Autoencoder, world: World, size: int, count: int, seed: int, path: Path) -> Drawings:
    """Draws and encodes `count` scenes, or reads `path`, where an earlier run left them."""
    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if len(kept["pictures"]) == count:
            return Drawings(kept["pictures"], kept["drawings"], kept["empty"], world, seed)
    device = next(autoencoder.parameters()).device

    def latents(pixels: list[Pixels]) -> Tensor:
        tensor = to_tensor(np.stack(pixels)).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            found: Tensor = autoencoder.encoder(tensor)
        return found.to("cpu", torch.bfloat16).contiguous()

    chunks: dict[str, list[Tensor]] = {"pictures": [], "drawings": []}
    for first in tqdm(range(0, count, CHUNK), desc="encode", mininterval=5):
        rows = range(first, min(first + CHUNK, count))
        scenes = [scene_of(world, seed, row) for row in rows]
        chunks["pictures"].append(latents([render(world, scene, size) for scene in scenes]))
        drawn = [
            draw(scene, size, np.random.default_rng((seed, row, 1))) for row, scene in zip(rows, scenes, strict=True)
        ]
        chunks["drawings"].append(latents(drawn))
    scale = autoencoder.config.scaling_factor
    kept = {name: torch.cat(parts) * scale for name, parts in chunks.items()}
    kept["empty"] = latents([np.zeros((size, size, 3), np.uint8)]) * scale
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    torch.save(kept, aside)
    aside.replace(path)
    return Drawings(kept["pictures"], kept["drawings"], kept["empty"], world, seed)


class Control:
    """A frozen student, the branch that is trained on it, and the loss of a batch."""

    def __init__(self, numbers: ControlStage, checkpoint: Checkpoint, device: torch.device) -> None:
        self.numbers = numbers
        self.guidance = checkpoint.settings.guidance_trained
        self.student = checkpoint.load_transformer(torch.float32, device)
        self.text: TextStage = load_text_stage(checkpoint, torch.float32, device)
        torch.manual_seed(numbers.seed)
        self.branch = ControlNet.of(self.student, numbers.copies, numbers.injection).to(device).train()
        self.whole = ControlledTransformer(self.student, self.branch)

    def batch(self, drawings: Drawings, step: int) -> Batch:
        numbers, device = self.numbers, self.student.proj_out.weight.device
        rng = np.random.default_rng((numbers.seed, step))
        rows = rng.integers(0, len(drawings.pictures), numbers.batch)
        text, mask = join(self.text.encode(drawings.captions(rows.tolist(), rng)))
        empty = int(rng.binomial(numbers.batch, numbers.empty_probability))
        control = drawings.drawings[rows].float()
        control[:empty] = drawings.empty.float()
        return Batch(drawings.pictures[rows].float().to(device), control.to(device), text.clone(), mask, empty)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the clean prediction: against the picture, or without strokes against the student."""
        numbers, count = self.numbers, len(batch.clean)
        angle = losses.angles(count, numbers.mean, numbers.std)
        angle = losses.with_max_time(angle, numbers.max_time_probability).to(batch.clean.device)
        low, high = self.guidance
        guidance = self.student.config.guidance_embeds_scale * (low + (high - low) * torch.rand_like(angle))
        time = flow_time(angle)
        column = time[:, None, None, None]
        x = input_scale(time)[:, None, None, None] * mix(batch.clean, torch.randn_like(batch.clean), angle)
        velocity = self.whole(x, batch.text, time, guidance, batch.mask, batch.control, torch.ones_like(time))
        predicted = x - column * velocity.float()
        wanted = batch.clean
        if batch.empty:
            e = slice(batch.empty)
            with torch.no_grad():
                mask = None if batch.mask is None else batch.mask[e]
                alone = self.student(x[e], batch.text[e], time[e], guidance[e], mask).float()
                wanted = torch.cat([x[e] - column[e] * alone, batch.clean[batch.empty :]])
        return F.mse_loss(predicted, wanted)

    @torch.no_grad()
    def sheet(self, drawings: Drawings, autoencoder: Autoencoder) -> Tensor:
        """Drawings, what one step makes of them, and what was drawn: [3 * SHEET,3,H,W]."""
        rng = np.random.default_rng(0)
        rows = list(range(SHEET))
        text, mask = join(self.text.encode(drawings.captions(rows, rng)))
        clean = drawings.pictures[:SHEET].float().to(text.device)
        time = torch.ones(SHEET, device=text.device)
        guidance = self.student.config.guidance_embeds_scale * torch.full_like(time, sum(self.guidance) / 2)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
        control = drawings.drawings[:SHEET].float().to(text.device)
        made = noise - self.whole(noise, text, time, guidance, mask, control, time).float()
        latents = torch.cat([control, made, clean]) / autoencoder.config.scaling_factor
        pictures: Tensor = autoencoder.decoder(latents)
        return pictures


def train(
    numbers: ControlStage, world: World, checkpoint: Checkpoint, folder: Path, accelerator: Accelerator
) -> ControlNet:
    """Trains or resumes; returns the averaged branch."""
    device = accelerator.device
    autoencoder = checkpoint.load_autoencoder(torch.float32, device)
    size = checkpoint.settings.default_size[0]
    drawings = encode(autoencoder, control_world(world), size, numbers.pictures, numbers.seed, folder / "drawings.pt")
    work = Control(numbers, checkpoint, device)
    branch = work.branch
    matrices, others = split_parameters(branch)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "matrices": Muon(matrices, numbers.matrix_learning_rate),
        "others": torch.optim.AdamW(others, numbers.learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    }
    rates = {"matrices": numbers.matrix_learning_rate, "others": numbers.learning_rate}
    average = Average(branch, numbers.ema)
    stage = Stage(
        folder,
        "control",
        numbers.steps,
        {"branch": branch, "average": average} | optimizers,
        accelerator.is_main_process,
    )
    done = stage.resume()
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    seen = 0.0
    for step in stage if not done else ():
        torch.manual_seed(numbers.seed + 7919 * step + accelerator.process_index)
        factor = learning_rate_factor(step, numbers.steps, numbers.warmup, numbers.decay_fraction)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor
            optimizer.zero_grad()
        batch = work.batch(drawings, step)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = work.loss(batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(branch.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in optimizers.values():
                optimizer.step()
        average.update(branch, step)
        seen += (loss.item() - seen) * (0.05 if seen else 1.0)
        if (step + 1) % REPORT_EVERY == 0:
            speed = numbers.batch * (stage.step + 1) / max(stage.seconds, 1.0)
            stage.report(loss=seen, gradient=float(norm), images_per_second=speed)
        if (step + 1) % numbers.sheet_every == 0:
            with average.applied_to(branch):
                stage.sheet(work.sheet(drawings, autoencoder), SHEET)
    average.copy_to(branch)
    return branch.eval()


def write_controlnet(folder: Path, branch: ControlNet, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the diffusers layout, which engines.checkpoints.controlnet reads. Overwrites what is there."""
    write_json(folder / "config.json", branch.config.to_dict())
    write_weights(folder / "diffusion_pytorch_model.safetensors", branch.state_dict(), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the one-step checkpoint that is to follow drawings")
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
