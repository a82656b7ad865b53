"""The judge: does a picture show what its caption asks for? Reads pixels alone.

As GenEval's evaluate_images.py (github.com/djghosh13/geneval), with a program that measures in the detector's place and
stricter: the number of things is exact, every thing has a clean shape and one plain colour, a named background holds.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.world.scenes import Kind, Range, Relation, Requirement, World, WorldError
from distill.world.shape_matching import Mask, core, hardened, match, regions
from engines.types import Pixels

WORKING_SIDE = 128  # pixels: larger pictures are averaged down to about this side
BACKGROUND_REACH = 75.0  # distances are Euclidean in RGB, 0 to 441
FOREGROUND_REACH = 45.0
COLOUR_REACH = 75.0
BORDER_SHARE = 0.9  # of the border that must have the background's colour
COLOUR_SHARE = 0.85  # of a thing's core that must have its colour
CORE = 0.4  # of a thing, its innermost part: where its colour is read
SPECK = 0.004  # of the picture: smaller regions are dropped ...
LITTER = 0.015  # ... unless together they cover more than this
OVERLAP = 0.90  # least intersection over union with a template; a square over a circle of equal area has 0.83
LEAD = 0.02  # least overlap over that with any other shape: between a circle and a square lies nothing
POSITION_SLACK = 0.1  # GenEval's position_threshold, of the summed extents

Box = tuple[float, float, float, float]  # left, top, right, bottom, of the picture's sides


@dataclass(frozen=True, slots=True)
class SeenThing:
    """One region: colour or shape None where it has none that is clear. Lengths in picture sides."""

    colour: str | None
    shape: str | None
    overlap: float
    size: float
    box: Box

    def __str__(self) -> str:
        return f"{self.colour or 'unclear'} {self.shape or 'something'}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` says what is wrong, one sentence each; empty when correct."""

    correct: bool
    reasons: tuple[str, ...]
    background: str | None
    things: tuple[SeenThing, ...]


def look(pixels: Pixels, world: World | None = None) -> tuple[str | None, tuple[SeenThing, ...], float]:
    """The background's name (None when unclear), the things seen, and the share of the picture that is litter.

    pixels: uint8 [H,W,3], sides of at least 64. Raises WorldError for other arrays.
    """
    world = world or World()
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 64:
        raise WorldError(f"pixels: got {pixels.dtype} {list(pixels.shape)}, allowed is uint8 [H,W,3] from 64x64")
    image = _working_copy(pixels)
    ground, clear = _ground(image)
    name = _nearest(ground[None], world.backgrounds, BACKGROUND_REACH)[0] if clear else None
    labels, count = regions(_length(image - ground) > FOREGROUND_REACH)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] / labels.size
    things = [_thing(image, ground, labels, label, world) for label in (np.nonzero(areas > SPECK)[0] + 1).tolist()]
    return name, tuple(things), float(areas[areas <= SPECK].sum())


def judge(pixels: Pixels, asked: Requirement, world: World | None = None) -> Verdict:
    """Whether uint8 [H,W,3] pixels show exactly what is asked: things, colours, shapes, relation, size, background."""
    world = world or World()
    background, things, litter = look(pixels, world)
    reasons: list[str] = []
    if background is None:
        reasons.append("the background is not plain")
    elif asked.background and background != asked.background:
        reasons.append(f"the background is {background}, asked was {asked.background}")
    if litter > LITTER:
        reasons.append(f"specks cover {litter:.1%} of the picture")
    if Counter((thing.colour, thing.shape) for thing in things) != Counter(asked.things):
        seen = ", ".join(map(str, things)) or "nothing"
        reasons.append(f"seen: {seen}; asked: {', '.join(map(' '.join, asked.things))}")
    else:
        reasons += _misplaced(things, asked, world)
    return Verdict(not reasons, tuple(reasons), background, things)


def relations_between(one: Box, other: Box) -> set[Relation]:
    """Where the first box stands, seen from the second: GenEval's rule (none, one, or two on a diagonal)."""
    offset = np.array([one[0] + one[2] - other[0] - other[2], one[1] + one[3] - other[1] - other[3]]) / 2
    extent = np.array([one[2] - one[0] + other[2] - other[0], one[3] - one[1] + other[3] - other[1]])
    moved = np.maximum(np.abs(offset) - POSITION_SLACK * extent, 0) * np.sign(offset)
    if not moved.any():
        return set()
    x, y = moved / np.linalg.norm(offset)
    found: dict[Relation, bool] = {"left": x < -0.5, "right": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in found.items() if holds}


def _misplaced(things: tuple[SeenThing, ...], asked: Requirement, world: World) -> list[str]:
    """What is wrong with the places and sizes of the right things."""
    if asked.size:
        ranges: dict[str | None, Range] = {None: world.single_size, **dict(world.sizes)}
        size = min(ranges, key=lambda word: abs(things[0].size - sum(ranges[word]) / 2))
        if size != asked.size:
            return [f"its size is {things[0].size:.2f} of the side, asked was {asked.size}"]
    if asked.relation:
        boxes = {Kind(thing.colour or "", thing.shape or ""): thing.box for thing in things}
        first, second = (boxes[kind] for kind in asked.things)
        found = relations_between(first, second)
        if asked.relation not in found:
            where = " and ".join(sorted(found)) or "neither beside nor above"
            return [f"the first thing stands {where} of the second, asked was {asked.relation}"]
    return []


def _working_copy(pixels: Pixels) -> NDArray[np.float32]:
    """float32 [h,w,3], averaged over whole squares of pixels to about WORKING_SIDE."""
    factor = max(1, min(pixels.shape[:2]) // WORKING_SIDE)
    height, width = (side // factor for side in pixels.shape[:2])
    cut = pixels[: height * factor, : width * factor]
    small = np.zeros((height, width, 3), np.float32)
    for row in range(factor):
        for column in range(factor):
            small += cut[row::factor, column::factor]
    small /= factor**2
    return small


def _length(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean length over the last axis."""
    lengths: NDArray[np.float32] = np.sqrt(np.einsum("...c,...c->...", colours, colours))
    return lengths


def _ground(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """The border's median colour [3], and whether nearly all of the border has it."""
    wide = max(2, min(image.shape[:2]) // 40)
    inside = np.zeros(image.shape[:2], bool)
    inside[wide:-wide, wide:-wide] = True
    border = image[~inside]
    ground = np.median(border, axis=0)
    return ground, bool((_length(border - ground) < FOREGROUND_REACH).mean() >= BORDER_SHARE)


def _nearest(
    colours: NDArray[np.float32], palette: tuple[tuple[str, tuple[int, int, int]], ...], reach: float
) -> list[str | None]:
    """The name of each colour [N,3]'s nearest neighbour in the palette, None beyond reach."""
    distances = _length(colours[:, None] - np.array([rgb for _, rgb in palette], np.float32))
    return [
        palette[best][0] if far <= reach else None
        for best, far in zip(distances.argmin(1).tolist(), distances.min(1).tolist(), strict=True)
    ]


def _thing(
    image: NDArray[np.float32], ground: NDArray[np.float32], labels: NDArray[np.int32], label: int, world: World
) -> SeenThing:
    height, width = labels.shape
    rows, columns = np.nonzero(labels == label)
    top, bottom = max(0, int(rows.min()) - 2), min(height, int(rows.max()) + 3)
    left, right = max(0, int(columns.min()) - 2), min(width, int(columns.max()) + 3)
    region: Mask = labels[top:bottom, left:right] == label
    others: Mask = ~region & (labels[top:bottom, left:right] > 0)
    patch = image[top:bottom, left:right]
    inside = core(region, CORE)
    names = Counter(_nearest(patch[inside], world.colours, COLOUR_REACH))
    colour, votes = names.most_common(1)[0]
    contrast = np.median(patch[inside], axis=0) - ground
    share = (patch - ground) @ contrast / max(float(contrast @ contrast), 1.0)
    cover = hardened(share)
    cover[others] = 0
    best = match(cover, world.shapes)
    side = min(height, width)
    return SeenThing(
        colour=colour if votes >= COLOUR_SHARE * inside.sum() else None,
        shape=best.shape if best.overlap >= OVERLAP and best.lead >= LEAD else None,
        overlap=best.overlap,
        size=best.size / side,
        box=(
            int(columns.min()) / width,
            int(rows.min()) / height,
            (int(columns.max()) + 1) / width,
            (int(rows.max()) + 1) / height,
        ),
    )
