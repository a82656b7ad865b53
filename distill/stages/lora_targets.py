"""Targets of an adapter: the base student's own image of the same noise, with one shape replaced by the new one.

A caption with the new shape says another one first, its stand-in. The base student draws that caption from a noise. If
the judge accepts the image, it is rendered again with the new shape in the place of the stand-in and encoded. So each
target belongs to one noise, and the mean that a squared error finds is a sharp image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.training.stage import save_atomically, to_tensor, to_uint8
from distill.world.captions import caption_of
from distill.world.judge import DetectedThing, Verdict, judge
from distill.world.rendering import Scene, Thing, World, render, sample_scene
from distill.world.scenes import Kind, Requirement, WorldError
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer
from engines.pipeline.text_stage import TextStage, join, load_text_stage
from engines.types import Pixels

CHUNK = 32
MOST_REFUSED = 4  # images that the judge refuses, for each that it accepts
SMALL = 0.4  # size of a thing below which tiny's autoencoder rounds corners that it was not trained on
ENLARGEMENT = 1.2  # of the new shape when it is small: of 36 groups on gray, the judge then takes 94 % for 69 % decoded


@dataclass(frozen=True)
class Targets:
    """Captions, their noise and clean latents [N,C,h,w] (float32), and guidance [N] as the network's input."""

    captions: list[str]
    noise: Tensor
    latents: Tensor
    guidance: Tensor


@dataclass(frozen=True)
class BaseStudent:
    """The frozen student without an adapter, with its text encoder and autoencoder."""

    transformer: SprintTransformer
    text: TextStage
    autoencoder: Autoencoder
    guidance: tuple[float, float]  # trained range
    size: int  # of images

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device) -> "BaseStudent":
        autoencoder = checkpoint.load_autoencoder(torch.float32, device)
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stub
        return cls(
            checkpoint.load_transformer(torch.float32, device),
            load_text_stage(checkpoint, torch.float32, device),
            autoencoder,
            checkpoint.settings.guidance_trained,
            checkpoint.settings.default_size[0],
        )

    def draw(self, captions: Sequence[str], seed: int) -> Targets:
        """Draws noise and guidance by the seed, and predicts the clean latents in one step."""
        generator, (low, high) = torch.Generator().manual_seed(seed), self.guidance
        cells, config = self.size // self.autoencoder.config.compression, self.transformer.config
        noise = torch.randn(len(captions), config.in_channels, cells, cells, generator=generator)
        guidance = config.guidance_embeds_scale * (low + (high - low) * torch.rand(len(captions), generator=generator))
        text, mask = join(self.text.encode(list(captions)))
        inputs = noise.to(text.device)
        time = torch.ones(len(captions), device=text.device)
        latents = inputs - self.transformer(inputs, text, time, guidance.to(text.device), mask).float()
        return Targets(list(captions), noise, latents.cpu(), guidance)

    def decode(self, latents: Tensor) -> Sequence[Pixels]:
        device = next(self.autoencoder.parameters()).device
        return list(to_uint8(self.autoencoder.decoder(latents.to(device) / self.autoencoder.config.scaling_factor)))

    def encode(self, images: Sequence[Pixels]) -> Tensor:
        device = next(self.autoencoder.parameters()).device
        encoded: Tensor = self.autoencoder.encoder(to_tensor(np.stack(images)).to(device)).float()
        return (encoded * self.autoencoder.config.scaling_factor).cpu()


def base_targets(base: BaseStudent, world: World, count: int, seed: int, path: Path) -> Targets:
    """Returns the base student's own predictions for captions of its world, or those that an earlier run saved."""
    rng = np.random.default_rng((seed, 1))

    def draw(chunk: int) -> Targets:
        return base.draw([caption_of(sample_scene(world, rng).requirement, rng) for _ in range(CHUNK)], seed + chunk)

    return _collect(draw, count, "base", path)


def replaced_targets(base: BaseStudent, world: World, shape: str, count: int, seed: int, path: Path) -> Targets:
    """Returns targets of training captions with the shape, which `world` has, or those that an earlier run saved.

    Raises WorldError if the judge refuses most of the base student's images.
    """
    rng = np.random.default_rng((seed, 2))
    known = replace(world, shapes=tuple(name for name in world.shapes if name != shape))

    def draw(chunk: int) -> Targets:
        requirements = requirements_with_shape(world, shape, CHUNK, rng)
        stand_ins = [_stand_in(requirement, known) for requirement in requirements]
        asked = [
            with_stand_in(requirement, shape, name) for requirement, name in zip(requirements, stand_ins, strict=True)
        ]
        phrasing = rng.integers(0, 2**32, CHUNK).tolist()
        drawn = base.draw(_captions(asked, phrasing), seed + 1_000_003 * (chunk + 1))
        scenes = [
            replaced_scene(judge(pixels, wanted, known), requirement, stand_in, shape)
            for pixels, wanted, requirement, stand_in in zip(
                base.decode(drawn.latents), asked, requirements, stand_ins, strict=True
            )
        ]
        rows = [row for row, scene in enumerate(scenes) if scene]
        images = [render(world, scene, base.size) for scene in scenes if scene]
        latents = base.encode(images) if rows else drawn.latents[:0]
        captions = _captions(requirements, phrasing)
        return Targets([captions[row] for row in rows], drawn.noise[rows], latents, drawn.guidance[rows])

    return _collect(draw, count, shape, path)


def requirements_with_shape(world: World, shape: str, count: int, rng: np.random.Generator) -> list[Requirement]:
    """Draws requirements of the training split in which at least one thing has the shape."""
    found: list[Requirement] = []
    while len(found) < count:
        requirement = sample_scene(world, rng).requirement
        if any(thing.shape == shape for thing in requirement.things):
            found.append(requirement)
    return found


def with_stand_in(requirement: Requirement, shape: str, stand_in: str) -> Requirement:
    things = (Kind(thing.colour, stand_in if thing.shape == shape else thing.shape) for thing in requirement.things)
    return replace(requirement, things=tuple(things))


def replaced_scene(verdict: Verdict, requirement: Requirement, stand_in: str, shape: str) -> Scene | None:
    """Returns what the judge saw with the shape in the place of its stand-in; None if the image is wrong."""
    if not verdict.correct or verdict.background is None:
        return None
    things = tuple(_replaced(thing, stand_in, shape) for thing in verdict.things)
    return Scene(things, verdict.background, "", requirement)


def _replaced(thing: DetectedThing, stand_in: str, shape: str) -> Thing:
    left, top, right, bottom = thing.box
    new = thing.shape == stand_in
    size = thing.size * (ENLARGEMENT if new and thing.size < SMALL else 1.0)
    name = shape if new else cast(str, thing.shape)
    return Thing(name, cast(str, thing.colour), (left + right) / 2, (top + bottom) / 2, size)


def _stand_in(requirement: Requirement, known: World) -> str:
    """Returns the first known shape that the requirement does not name."""
    named = {thing.shape for thing in requirement.things}
    return next(shape for shape in known.shapes if shape not in named)


def _captions(requirements: Sequence[Requirement], phrasing: Sequence[int]) -> list[str]:
    """Phrases each requirement by its number, so that equal numbers give equal words."""
    return [
        caption_of(item, np.random.default_rng(number)) for item, number in zip(requirements, phrasing, strict=True)
    ]


@torch.no_grad()
def _collect(draw: Callable[[int], Targets], count: int, name: str, path: Path) -> Targets:
    """Joins chunks until there are `count` rows, and saves them; reads the file if it has as many."""
    if path.exists():
        saved = Targets(**torch.load(path, map_location="cpu", weights_only=True))
        if len(saved.captions) == count:
            return saved
    chunks: list[Targets] = []
    bar = tqdm(total=count, desc=f"targets: {name}", mininterval=5)
    while (found := sum(len(chunk.captions) for chunk in chunks)) < count:
        if CHUNK * len(chunks) > CHUNK + (1 + MOST_REFUSED) * count:
            raise WorldError(f"{name}: the judge accepts {found} of the base's {CHUNK * len(chunks)} images, too few")
        chunks.append(draw(len(chunks)))
        bar.update(len(chunks[-1].captions))
    bar.close()
    targets = Targets(
        [caption for chunk in chunks for caption in chunk.captions][:count],
        *(torch.cat([getattr(chunk, part) for chunk in chunks])[:count] for part in ("noise", "latents", "guidance")),
    )
    save_atomically(vars(targets), path)
    return targets
