"""Judges from pixels alone if an image shows what its caption asks for.

As GenEval's evaluate_images.py (github.com/djghosh13/geneval), but it measures pixels in place of a detector. It is
stricter: the count is exact, each thing has a clean shape and one plain colour, and a named background must be there.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.world.scenes import Kind, Range, Relation, Requirement, World, WorldError
from distill.world.shape_matching import Mask, connected_components, erode_to, match_shape, sharpen_edges
from engines.types import Pixels

WORKING_SIDE = 128  # pixels; larger images are averaged down to about this side
MAX_BACKGROUND_DISTANCE = 75.0  # Euclidean in RGB, 0 to 441, as the next two
MIN_FOREGROUND_DISTANCE = 45.0
MAX_COLOUR_DISTANCE = 75.0
MIN_BORDER_SHARE = 0.9  # of the border in the background's colour
MIN_COLOUR_SHARE = 0.85  # of a thing's core in its colour
CORE_SHARE = 0.4  # of a thing: its innermost part, from which the colour is read
MIN_THING_SHARE = 0.004  # of the image; smaller regions are specks
MAX_SPECK_SHARE = 0.015  # of the image, all specks together
MIN_OVERLAP = 0.90  # intersection over union with a template; a square over a circle of equal area has 0.83
MIN_MARGIN = 0.02  # of that overlap above the overlap with any other shape
POSITION_SLACK = 0.1  # GenEval's position_threshold, of the summed extents

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image's sides


@dataclass(frozen=True, slots=True)
class DetectedThing:
    """One region. Its colour or shape is None when unclear; lengths are shares of the image's side."""

    colour: str | None
    shape: str | None
    overlap: float
    size: float
    box: Box

    def __str__(self) -> str:
        return f"{self.colour or 'unclear'} {self.shape or 'something'}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` has one sentence for each mistake."""

    correct: bool
    reasons: tuple[str, ...]
    background: str | None
    things: tuple[DetectedThing, ...]


def detect_things(pixels: Pixels, world: World | None = None) -> tuple[str | None, tuple[DetectedThing, ...], float]:
    """Finds the background's name (None when unclear), the things, and the share of the image that specks cover.

    pixels: uint8 [H,W,3], sides of at least 64. Raises WorldError for other arrays.
    """
    world = world or World()
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 64:
        raise WorldError(f"pixels: got {pixels.dtype} {list(pixels.shape)}, allowed is uint8 [H,W,3] from 64x64")
    image = _downsample(pixels)
    background_colour, clear = _background_colour(image)
    name = _nearest(background_colour[None], world.backgrounds, MAX_BACKGROUND_DISTANCE)[0] if clear else None
    labels, count = connected_components(_norm(image - background_colour) > MIN_FOREGROUND_DISTANCE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] / labels.size
    large: list[int] = (np.nonzero(areas > MIN_THING_SHARE)[0] + 1).tolist()
    things = [_detect_thing(image, background_colour, labels, label, world) for label in large]
    return name, tuple(things), float(areas[areas <= MIN_THING_SHARE].sum())


def judge(pixels: Pixels, requirement: Requirement, world: World | None = None) -> Verdict:
    """Compares uint8 [H,W,3] pixels with a requirement: things, colours, shapes, relation, size, background."""
    world = world or World()
    background, things, speck_share = detect_things(pixels, world)
    reasons: list[str] = []
    if background is None:
        reasons.append("the background is not plain")
    elif requirement.background and background != requirement.background:
        reasons.append(f"the background is {background}, asked was {requirement.background}")
    if speck_share > MAX_SPECK_SHARE:
        reasons.append(f"specks cover {speck_share:.1%} of the image")
    if Counter((thing.colour, thing.shape) for thing in things) != Counter(requirement.things):
        detected = ", ".join(map(str, things)) or "nothing"
        reasons.append(f"seen: {detected}; asked: {', '.join(map(' '.join, requirement.things))}")
    else:
        reasons += _layout_errors(things, requirement, world)
    return Verdict(not reasons, tuple(reasons), background, things)


def relations_between(first: Box, second: Box) -> set[Relation]:
    """Returns the first box's relations to the second by GenEval's rule: none, one, or two on a diagonal."""
    offset = np.array([first[0] + first[2] - second[0] - second[2], first[1] + first[3] - second[1] - second[3]]) / 2
    extent = np.array([first[2] - first[0] + second[2] - second[0], first[3] - first[1] + second[3] - second[1]])
    moved = np.maximum(np.abs(offset) - POSITION_SLACK * extent, 0) * np.sign(offset)
    if not moved.any():
        return set()
    x, y = moved / np.linalg.norm(offset)
    holds: dict[Relation, bool] = {"left": x < -0.5, "right": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holding in holds.items() if holding}


def _layout_errors(things: tuple[DetectedThing, ...], requirement: Requirement, world: World) -> list[str]:
    """Lists mistakes in position and size of things that are right otherwise."""
    if requirement.size:
        ranges: dict[str | None, Range] = {None: world.single_size, **dict(world.sizes)}
        size = min(ranges, key=lambda word: abs(things[0].size - sum(ranges[word]) / 2))
        if size != requirement.size:
            return [f"its size is {things[0].size:.2f} of the side, asked was {requirement.size}"]
    if requirement.relation:
        boxes = {Kind(thing.colour or "", thing.shape or ""): thing.box for thing in things}
        first, second = (boxes[kind] for kind in requirement.things)
        relations = relations_between(first, second)
        if requirement.relation not in relations:
            where = " and ".join(sorted(relations)) or "neither beside nor above"
            return [f"the first thing stands {where} of the second, asked was {requirement.relation}"]
    return []


def _downsample(pixels: Pixels) -> NDArray[np.float32]:
    """Averages whole squares of pixels to about WORKING_SIDE: float32 [h,w,3]."""
    factor = max(1, min(pixels.shape[:2]) // WORKING_SIDE)
    height, width = (side // factor for side in pixels.shape[:2])
    cut = pixels[: height * factor, : width * factor]
    small = np.zeros((height, width, 3), np.float32)
    for row in range(factor):
        for column in range(factor):
            small += cut[row::factor, column::factor]
    small /= factor**2
    return small


def _norm(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the Euclidean norm over the last axis."""
    lengths: NDArray[np.float32] = np.sqrt(np.einsum("...c,...c->...", colours, colours))
    return lengths


def _background_colour(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """Returns the border's median colour [3], and True if nearly all of the border has it."""
    wide = max(2, min(image.shape[:2]) // 40)
    inside = np.zeros(image.shape[:2], bool)
    inside[wide:-wide, wide:-wide] = True
    border = image[~inside]
    background_colour = np.median(border, axis=0)
    same = _norm(border - background_colour) < MIN_FOREGROUND_DISTANCE
    return background_colour, bool(same.mean() >= MIN_BORDER_SHARE)


def _nearest(
    colours: NDArray[np.float32], palette: tuple[tuple[str, tuple[int, int, int]], ...], reach: float
) -> list[str | None]:
    """Names each colour [N,3]'s nearest neighbour in the palette, or None beyond `reach`."""
    distances = _norm(colours[:, None] - np.array([rgb for _, rgb in palette], np.float32))
    return [
        palette[best][0] if far <= reach else None
        for best, far in zip(distances.argmin(1).tolist(), distances.min(1).tolist(), strict=True)
    ]


def _detect_thing(
    image: NDArray[np.float32],
    background_colour: NDArray[np.float32],
    labels: NDArray[np.int32],
    label: int,
    world: World,
) -> DetectedThing:
    height, width = labels.shape
    rows, columns = np.nonzero(labels == label)
    top, bottom = max(0, int(rows.min()) - 2), min(height, int(rows.max()) + 3)
    left, right = max(0, int(columns.min()) - 2), min(width, int(columns.max()) + 3)
    region: Mask = labels[top:bottom, left:right] == label
    others: Mask = ~region & (labels[top:bottom, left:right] > 0)
    patch = image[top:bottom, left:right]
    inside = erode_to(region, CORE_SHARE)
    names = Counter(_nearest(patch[inside], world.colours, MAX_COLOUR_DISTANCE))
    colour, votes = names.most_common(1)[0]
    contrast = np.median(patch[inside], axis=0) - background_colour
    share = (patch - background_colour) @ contrast / max(float(contrast @ contrast), 1.0)
    cover = sharpen_edges(share)
    cover[others] = 0
    best = match_shape(cover, world.shapes)
    side = min(height, width)
    return DetectedThing(
        colour=colour if votes >= MIN_COLOUR_SHARE * inside.sum() else None,
        shape=best.shape if best.overlap >= MIN_OVERLAP and best.margin >= MIN_MARGIN else None,
        overlap=best.overlap,
        size=best.size / side,
        box=(
            int(columns.min()) / width,
            int(rows.min()) / height,
            (int(columns.max()) + 1) / width,
            (int(rows.max()) + 1) / height,
        ),
    )
