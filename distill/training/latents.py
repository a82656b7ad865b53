"""Pictures encoded once: the teacher and the student train on latents, as the paper's runs do (load_vae_feat).

Beside each latent lies its layout: how much of every latent cell each colour and each shape covers. The teacher
predicts it as extra output channels (see distill/stages/teacher.py); nothing of it is left in the checkpoint.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from distill.training.stage import to_tensor
from distill.world.rendering import Scene, World, caption, coverage, render, sample_scene
from engines.models.dcae import Autoencoder

CHUNK = 32
LAYOUT_DETAIL = 4  # samples per cell along each side


def layout_channels(world: World) -> int:
    """Channels of a layout: one per colour, one per shape."""
    return len(world.colours) + len(world.shapes)


def layout_of(world: World, scene: Scene, cells: int) -> NDArray[np.uint8]:
    """Share (of 255) of each of cells x cells that each colour, then each shape, covers: [K,cells,cells]."""
    side = cells * LAYOUT_DETAIL
    names = [name for name, _ in world.colours] + list(world.shapes)
    layout = np.zeros((len(names), side, side), np.float32)
    centres = np.arange(side, dtype=np.float32) + np.float32(0.5)
    for thing in scene.things:
        x, y = (centres - np.float32(thing.x * side))[None, :], (centres - np.float32(thing.y * side))[:, None]
        covered = coverage(thing.shape, x, y, thing.size * side, thing.angle)
        for name in (thing.colour, thing.shape):
            np.maximum(layout[names.index(name)], covered, out=layout[names.index(name)])
    shares = layout.reshape(len(names), cells, LAYOUT_DETAIL, cells, LAYOUT_DETAIL).mean(axis=(2, 4))
    rounded: NDArray[np.uint8] = np.round(shares * 255).astype(np.uint8)
    return rounded


@dataclass(frozen=True)
class Batch:
    """Latents [B,C,h,w], layouts [B,K,h,w] in [0,1] where there are any (both float32), captions."""

    latents: Tensor
    layouts: Tensor | None
    captions: list[str]


@dataclass(frozen=True)
class Latents:
    """Unit-variance latents [N,C,h,w] (bfloat16), layouts [N,K,h,w] (uint8) if known, and how a row is captioned."""

    values: Tensor
    layouts: Tensor | None
    caption: Callable[[int, np.random.Generator], str]

    def batches(self, batch: int, seed: int, start: int) -> Iterator[Batch]:
        """Endless random batches, captions phrased anew each time; `start` continues a stopped stream."""
        index = start
        while True:
            rng = np.random.default_rng((seed, index))
            chosen = rng.integers(0, len(self.values), batch)
            rows = torch.from_numpy(chosen)
            layouts = None if self.layouts is None else self.layouts[rows].float() / 255
            yield Batch(self.values[rows].float(), layouts, [self.caption(int(row), rng) for row in chosen])
            index += 1


def encode_scenes(
    world: World, autoencoder: Autoencoder, size: int, count: int, seed: int, path: Path, progress: bool = True
) -> Latents:
    """Encodes `count` seeded training scenes (or reads `path`, where an earlier run left them)."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(world, rng) for _ in range(count)]

    def phrase(row: int, words: np.random.Generator) -> str:
        return caption(world, scenes[row], words)

    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if len(kept["values"]) == count:
            return Latents(kept["values"], kept["layouts"], phrase)
    device = next(autoencoder.parameters()).device
    cells = size // autoencoder.config.compression
    chunks = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for first in tqdm(range(0, count, CHUNK), desc="encode", disable=not progress, mininterval=5):
            pictures = np.stack([render(world, scene, size) for scene in scenes[first : first + CHUNK]])
            pixels = to_tensor(pictures).to(device, memory_format=torch.channels_last)
            chunks.append(autoencoder.encoder(pixels).to("cpu", torch.bfloat16).contiguous())
    values = torch.cat(chunks) * autoencoder.config.scaling_factor
    layouts = torch.from_numpy(np.stack([layout_of(world, scene, cells) for scene in scenes]))
    aside = path.with_suffix(".part")
    torch.save({"values": values, "layouts": layouts}, aside)
    aside.replace(path)
    return Latents(values, layouts, phrase)
