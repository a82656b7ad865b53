"""Sketches of scenes in the manner of a hand: white strokes on black, shaky, sometimes open, of any width.

A shape's outline is where its signed distance (distill/world/rendering.py) is zero, so new shapes need no code here.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from distill.world.rendering import MAX_RADIUS, SIGNED_DISTANCES, Scene, Thing
from engines.types import Pixels

Points = NDArray[np.float64]  # [N,2], x and y

RAYS = 240  # points of a whole outline
SUPERSAMPLE = 2
WIDTH = (0.007, 0.042)  # of a stroke, over the image's side
WAVES = 6  # around an outline, which make it shaky
SHAKE = 0.011  # standard deviation of a wave's amplitude, over the thing's size; shorter waves have less
SLIP = 0.015  # standard deviation of a stroke's offset, over the thing's size
MAX_STROKES = 4
OPEN_PROBABILITY = 0.15  # of an unfinished outline
MIN_DRAWN = 0.5


def draw_sketch(scene: Scene, size: int, rng: np.random.Generator) -> Pixels:
    """Sketches all things of a scene: uint8 [size,size,3], white on black."""
    side = size * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    width = max(1, round(rng.uniform(*WIDTH) * side))
    for thing in scene.things:
        for stroke in strokes(thing, rng):
            positions = [(float(x), float(y)) for x, y in stroke * side]
            pen.line(positions, fill=255, width=width, joint="curve")
            for x, y in (positions[0], positions[-1]):
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.repeat(np.asarray(small)[..., None], 3, axis=2)


def strokes(thing: Thing, rng: np.random.Generator) -> Iterator[Points]:
    """Yields the strokes of one outline, as shares of the image's sides."""
    around = outline(thing.shape)
    turns = np.linspace(0, 2 * math.pi, RAYS, endpoint=False)
    waves = np.arange(1, WAVES + 1)
    amplitude = rng.normal(0, SHAKE, (2, 2, WAVES)) / np.sqrt(waves)
    phase = waves[:, None] * turns
    shaken = around + (amplitude[0] @ np.cos(phase) + amplitude[1] @ np.sin(phase)).T
    angle = math.radians(thing.angle)
    turned = shaken @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    placed = np.array([thing.x, thing.y]) + thing.size * turned
    drawn = rng.uniform(MIN_DRAWN, 1) if rng.random() < OPEN_PROBABILITY else rng.uniform(0.97, 1.05)
    first, total = int(rng.integers(RAYS)), round(drawn * RAYS)
    cuts = np.sort(rng.integers(1, total, int(rng.integers(MAX_STROKES))))
    for begin, end in zip((0, *cuts), (*cuts, total), strict=True):
        chosen = (first + np.arange(begin, end + 1)) % RAYS
        yield placed[chosen] + rng.normal(0, SLIP * thing.size, 2)


def outline(shape: str) -> Points:
    """Finds the edge of a shape of size 1 along RAYS rays from its origin, by bisection; shapes are star-shaped."""
    turns = np.linspace(0, 2 * math.pi, RAYS, endpoint=False)
    direction = np.stack([np.cos(turns), np.sin(turns)]).astype(np.float32)
    inside, outside = np.zeros(RAYS, np.float32), np.full(RAYS, MAX_RADIUS + 0.1, np.float32)
    for _ in range(20):
        middle = (inside + outside) / 2
        within = SIGNED_DISTANCES[shape](*(direction * middle)) < 0
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    points: Points = (direction * inside).T.astype(np.float64)
    return points
