"""Images encoded once: teacher and student train on latents, as the paper's runs do (load_vae_feat).

Each latent has a layout: the share of every latent cell that each colour and each shape covers. The teacher predicts it
as extra output channels (distill/stages/teacher.py), which the checkpoint leaves out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from distill.training.stage import save_atomically, to_tensor
from distill.world.captions import caption_of
from distill.world.rendering import Scene, World, coverage, render, sample_scene
from engines.models.dcae import Autoencoder

CHUNK = 32
LAYOUT_DETAIL = 4  # samples per cell along each side


def layout_channels(world: World) -> int:
    """Returns the number of a layout's channels: one per colour, one per shape."""
    return len(world.colours) + len(world.shapes)


def layout_of(world: World, scene: Scene, cells: int) -> NDArray[np.uint8]:
    """Returns the share (of 255) that each colour, then each shape, covers of each cell: [K,cells,cells]."""
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
    """Latents [B,C,h,w] and layouts [B,K,h,w] in [0,1] or None (both float32), and captions."""

    latents: Tensor
    layouts: Tensor | None
    captions: list[str]


@dataclass(frozen=True)
class Latents:
    """Unit-variance latents [N,C,h,w] (bfloat16), layouts [N,K,h,w] (uint8) or None, and a caption writer by row."""

    values: Tensor
    layouts: Tensor | None
    caption: Callable[[int, np.random.Generator], str]

    def batches(self, batch: int, seed: int, start: int) -> Iterator[Batch]:
        """Yields random batches without end, each with new captions; `start` resumes a stream at that batch."""
        index = start
        while True:
            rng = np.random.default_rng((seed, index))
            chosen = rng.integers(0, len(self.values), batch)
            rows = torch.from_numpy(chosen)
            layouts = None if self.layouts is None else self.layouts[rows].float() / 255
            yield Batch(self.values[rows].float(), layouts, [self.caption(int(row), rng) for row in chosen])
            index += 1


def encode_scenes(world: World, autoencoder: Autoencoder, size: int, count: int, seed: int, path: Path) -> Latents:
    """Encodes `count` seeded training scenes, or reads them from `path` if an earlier run saved them."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(world, rng) for _ in range(count)]

    def caption(row: int, caption_rng: np.random.Generator) -> str:
        return caption_of(scenes[row].requirement, caption_rng)

    if path.exists():
        cached = torch.load(path, map_location="cpu", weights_only=True)
        if len(cached["values"]) == count:
            return Latents(cached["values"], cached["layouts"], caption)
    device = next(autoencoder.parameters()).device
    cells = size // autoencoder.config.compression
    chunks = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for first in tqdm(range(0, count, CHUNK), desc="encode", mininterval=5):
            images = [render(world, scene, size) for scene in scenes[first : first + CHUNK]]
            pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
            chunks.append(autoencoder.encoder(pixels).to("cpu", torch.bfloat16).contiguous())
    values = torch.cat(chunks) * autoencoder.config.scaling_factor
    layouts = torch.from_numpy(np.stack([layout_of(world, scene, cells) for scene in scenes]))
    save_atomically({"values": values, "layouts": layouts}, path)
    return Latents(values, layouts, caption)
