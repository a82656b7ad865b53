"""Renders images of the tiny world from signed distance functions, and streams them with captions.

    for pixels, captions in batches(World(), size=256, batch=32, seed=0): ...      # uint8 [32,256,256,3], 32 strings

It needs no torch. distill/world/scenes.py defines worlds, distill/world/captions.py their words.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from distill.world.captions import caption_of, vocabulary
from distill.world.scenes import CATEGORIES, Scene, Thing, World, sample_scene
from engines.types import Pixels

__all__ = ["CATEGORIES", "Scene", "Thing", "World", "batches", "render", "sample_scene", "vocabulary"]

Plane = NDArray[np.float32]

MAX_RADIUS = 0.7  # farthest point of any shape from its origin, over its size


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - np.float32(0.5)


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.45)


def _triangle(x: Plane, y: Plane) -> Plane:
    """Equilateral, point up, side 1.05. Its origin is the middle of its bounding box, above the centroid."""
    side, y = 1.05, y - np.float32(1.05 * math.sqrt(3) / 12)
    sides = np.abs(x) * np.float32(math.sqrt(3) / 2) - y * np.float32(0.5)
    return np.maximum(sides, y) - np.float32(side / (2 * math.sqrt(3)))


def _diamond(x: Plane, y: Plane) -> Plane:
    """Not in the shipped world; an adapter teaches it (distill/lora.py)."""
    return (np.abs(x) + np.abs(y) - np.float32(0.58)) * np.float32(math.sqrt(0.5))


# Signed distance to the outline, in units of the thing's size: negative inside.
SIGNED_DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
}


def coverage(shape: str, x: Plane, y: Plane, size: float, angle: float) -> Plane:
    """Returns the share of each pixel inside a shape of `size` pixels; x [1,W] and y [H,1] are offsets from its centre.

    The edge is one pixel wide.
    """
    turn = math.radians(angle)
    cos, sin = np.float32(math.cos(turn) / size), np.float32(math.sin(turn) / size)
    distance = SIGNED_DISTANCES[shape](x * cos + y * sin, y * cos - x * sin)
    covered: Plane = np.clip(np.float32(0.5) - distance * np.float32(size), 0.0, 1.0)
    return covered


def render(world: World, scene: Scene, size: int) -> Pixels:
    """Renders a scene: uint8 [size,size,3]. Later things cover earlier ones."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = world.rgb(scene.background)
    for thing in scene.things:
        reach = MAX_RADIUS * thing.size * size + 1
        left, top = (max(0, math.floor(c * size - reach)) for c in (thing.x, thing.y))
        right, bottom = (min(size, math.ceil(c * size + reach)) for c in (thing.x, thing.y))
        x = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - thing.x * size))[None, :]
        y = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - thing.y * size))[:, None]
        covered = coverage(thing.shape, x, y, thing.size * size, thing.angle)[..., None]
        colour = np.clip(np.add(world.rgb(thing.colour), thing.tint), 0, 255).astype(np.float32)
        patch = image[top:bottom, left:right]
        patch[:] = (patch + covered * (colour - patch) + np.float32(0.5)).astype(np.uint8)
    return image


def batches(world: World, size: int, batch: int, seed: int, start: int = 0) -> Iterator[tuple[Pixels, list[str]]]:
    """Yields training images [batch,size,size,3] uint8 and their captions without end.

    Batch i depends on (seed, i) alone; `start` resumes a stream at the batch of that index.
    """
    index = start
    while True:
        rng = np.random.default_rng((seed, index))
        scenes = [sample_scene(world, rng) for _ in range(batch)]
        images = np.stack([render(world, scene, size) for scene in scenes])
        yield images, [caption_of(scene.requirement, rng) for scene in scenes]
        index += 1
