"""The tiny world: its things, their arrangement in an image, and the combinations held out from training.

A world is a frozen dataclass of words and ranges, so another world is another `World(...)`.
Lengths and positions are fractions of the image side, x to the right and y downwards; angles are in degrees.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from engines.errors import SprintError

RGB = tuple[int, int, int]
Range = tuple[float, float]
Split = Literal["train", "held_out"]
Relation = Literal["left", "right", "above", "below"]

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's six tags
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
DRAWABLE_SHAPES = ("circle", "square", "triangle", "diamond")
HALF_EXTENT = 0.585  # of a thing over its size, for every shape tilted up to 8 degrees


class WorldError(SprintError):
    """A world contradicts itself, or a caption or category does not belong to it."""


# `combinations` hashes the repr of these two: another name of a class or field is another held-out split.
class Kind(NamedTuple):
    """Colour and shape of one thing."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Requirement:
    """The content of a caption: every thing (a count repeats one kind), and relation, size and background if named.

    `relation` is the first thing's direction as seen from the second.
    """

    things: tuple[Kind, ...]
    relation: Relation | None = None
    size: str | None = None
    background: str | None = None


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in an image. (x, y) is its centre; `size` is a circle's diameter, and other shapes have like areas."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    angle: float = 0.0  # degrees, clockwise
    tint: RGB = (0, 0, 0)  # added to the colour's RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """An image before rendering. `background` is always set; `requirement` is what its caption says."""

    things: tuple[Thing, ...]
    background: str
    category: str
    requirement: Requirement


@dataclass(frozen=True)
class World:
    """Words and ranges of one world, by default the shipped checkpoint's."""

    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    colours: tuple[tuple[str, RGB], ...] = (
        ("red", (226, 38, 44)),
        ("green", (38, 166, 76)),
        ("blue", (32, 84, 228)),
        ("yellow", (255, 220, 36)),
        ("orange", (252, 132, 12)),
        ("purple", (142, 46, 190)),
    )
    backgrounds: tuple[tuple[str, RGB], ...] = (
        ("white", (255, 255, 255)),
        ("black", (12, 12, 14)),
        ("gray", (196, 198, 202)),
    )
    plain_background: str = "white"  # for captions that name no background
    sizes: tuple[tuple[str, Range], ...] = (("small", (0.24, 0.28)), ("big", (0.62, 0.68)))
    single_size: Range = (0.42, 0.48)
    pair_size: Range = (0.29, 0.33)
    count_size: Range = (0.26, 0.29)
    relations: tuple[Relation, ...] = ("left", "right", "above", "below")
    free_relation: Relation = "left"  # of the first of two things when the caption names none
    count_layouts: tuple[tuple[tuple[float, float], ...], ...] = (
        ((0.28, 0.5), (0.72, 0.5)),
        ((0.5, 0.28), (0.27, 0.72), (0.73, 0.72)),
        ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
    )
    gap: float = 0.06  # between things
    margin: float = 0.03  # between things and the edge
    single_jitter: float = 0.05
    pair_jitter: float = 0.04  # of both things together, across the axis of their relation
    pair_offset: float = 0.02  # of each of the two
    count_jitter: float = 0.015
    max_angle: float = 3.0
    tint: int = 5  # largest colour jitter, of 255
    category_weights: tuple[float, ...] = (0.20, 0.14, 0.14, 0.16, 0.22, 0.14)  # as in CATEGORIES
    size_named: float = 0.5  # in single_object
    background_named: float = 0.6
    holdout: float = 0.1  # of the combinations of every category
    holdout_salt: int = 5  # chosen so that the README's examples are trained on

    def __post_init__(self) -> None:
        unknown = sorted(set(self.shapes) - set(DRAWABLE_SHAPES))
        if unknown:
            raise WorldError(f"shapes: got {', '.join(unknown)}, drawable are {', '.join(DRAWABLE_SHAPES)}")
        names = [name for name, _ in self.backgrounds]
        if self.plain_background not in names:
            raise WorldError(f"plain_background: got {self.plain_background!r}, backgrounds are {', '.join(names)}")
        if len(self.category_weights) != len(CATEGORIES) or abs(sum(self.category_weights) - 1) > 1e-6:
            raise WorldError(f"category_weights: got {self.category_weights}, allowed are six that sum to 1")
        counts = [len(layout) for layout in self.count_layouts]
        if not set(counts) <= {2, 3, 4}:
            raise WorldError(f"count_layouts: got {counts} positions, allowed are 2, 3 and 4")
        if 4 * HALF_EXTENT * self.pair_size[1] + self.gap + 2 * self.margin > 1:
            raise WorldError(f"pair_size: got {self.pair_size}, two of the largest with gap and margins do not fit")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(Kind(colour, shape) for shape in self.shapes for colour, _ in self.colours)

    def rgb(self, name: str) -> RGB:
        """The RGB of a colour or a background. Raises WorldError for a name this world lacks."""
        palette = dict((*self.colours, *self.backgrounds))
        if name not in palette:
            raise WorldError(f"colour: got {name!r}, this world has {', '.join(palette)}")
        return palette[name]


def _combinations(world: World, category: str) -> list[list[Requirement]]:
    """Lists every combination of a category by stratum; each stratum gives its share to the held-out split.

    Swapped things, also with the opposite relation, are the same combination.
    """
    kinds, pairs = world.kinds, list(itertools.combinations(world.kinds, 2))
    named = [name for name, _ in world.backgrounds]
    if category == "colors":
        return [[Requirement((kind,), background=name) for kind in kinds for name in named]]
    if category == "single_object":
        sizes = [size for size, _ in world.sizes]
        plain = _combinations(world, "colors")
        return plain + [[replace(item, size=size) for item in plain[0]] for size in sizes]
    if category == "two_object":
        return [[Requirement(pair) for pair in pairs]]
    if category == "color_attr":
        return [[Requirement((a, b)) for a, b in pairs if a.colour != b.colour and a.shape != b.shape]]
    if category == "position":
        axes: list[Relation] = [r for r in world.relations if r in ("left", "above")]
        axes += [r for r in world.relations if r in ("right", "below") and OPPOSITE[r] not in axes]
        return [[Requirement(pair, relation=r) for pair in itertools.permutations(kinds, 2)] for r in axes]
    if category == "counting":
        return [[Requirement((kind,) * len(layout)) for kind in kinds] for layout in world.count_layouts]
    raise WorldError(f"category: got {category!r}, allowed are {', '.join(CATEGORIES)}")


@lru_cache(maxsize=64)
def combinations(world: World, category: str, split: Split) -> tuple[Requirement, ...]:
    """Returns the combinations of a category in a split. A hash of the words keeps the splits disjoint.

    A pair is held out from two_object and color_attr alike. For one thing a named background is part of the
    combination, and training sees every thing without one. Raises WorldError for an unknown category.
    """
    # color_attr is part of two_object: training on one must not show what the other holds out.
    if category == "color_attr":
        members = set(_combinations(world, category)[0])
        return tuple(c for c in combinations(world, "two_object", split) if c in members)
    if category == "colors":
        return tuple(c for c in combinations(world, "single_object", split) if c.size is None)

    def rank(requirement: Requirement) -> bytes:
        return hashlib.blake2b(f"{world.holdout_salt} {category} {requirement!r}".encode(), digest_size=8).digest()

    chosen: list[Requirement] = []
    for stratum in _combinations(world, category):
        held = math.ceil(world.holdout * len(stratum)) if world.holdout else 0
        ranked = sorted(stratum, key=rank)
        chosen += ranked[:held] if split == "held_out" else ranked[held:]
    return tuple(chosen)


def sample_request(world: World, rng: np.random.Generator, category: str, split: Split) -> Requirement:
    """Draws a combination of the split, then its order and its background at random where they are free."""
    pool = combinations(world, category, split)
    if not pool:
        raise WorldError(f"category {category}: the split {split} of this world is empty; raise `holdout` or add words")
    if category == "single_object":
        sized = bool(rng.random() < world.size_named)
        pool = tuple(c for c in pool if (c.size is not None) == sized)
    requirement = pool[int(rng.integers(len(pool)))]
    flip, named = bool(rng.random() < 0.5), bool(rng.random() < world.background_named)
    if category in ("single_object", "colors"):
        if split == "train" and not named:
            return replace(requirement, things=(world.kinds[int(rng.integers(len(world.kinds)))],), background=None)
        return requirement
    if category == "position" and flip and requirement.relation and OPPOSITE[requirement.relation] in world.relations:
        requirement = replace(requirement, things=requirement.things[::-1], relation=OPPOSITE[requirement.relation])
    elif category in ("two_object", "color_attr") and flip:
        requirement = replace(requirement, things=requirement.things[::-1])
    if named:
        requirement = replace(requirement, background=world.backgrounds[int(rng.integers(len(world.backgrounds)))][0])
    return requirement


def sample_scene(world: World, rng: np.random.Generator, category: str | None = None, split: Split = "train") -> Scene:
    """Draws a scene of a category (of any when None) from a split. Raises WorldError for an unknown category."""
    if category is None:
        category = CATEGORIES[int(rng.choice(len(CATEGORIES), p=world.category_weights))]
    requirement = sample_request(world, rng, category, split)
    return scene_for(world, rng, requirement, category)


def scene_for(world: World, rng: np.random.Generator, requirement: Requirement, category: str) -> Scene:
    """Draws positions, exact sizes, angles and tints for a requirement."""
    count = len(requirement.things)
    if count == 1:
        positions = [_single_position(world, rng, requirement.size)]
    elif len(set(requirement.things)) > 1:
        positions = _pair_positions(world, rng, requirement.relation or world.free_relation)
    else:
        positions = _count_positions(world, rng, count)
    angles = rng.uniform(-world.max_angle, world.max_angle, count)
    tints = rng.integers(-world.tint, world.tint + 1, (count, 3))
    things = tuple(
        Thing(kind.shape, kind.colour, x, y, size, float(angle), (int(tint[0]), int(tint[1]), int(tint[2])))
        for kind, (x, y, size), angle, tint in zip(requirement.things, positions, angles, tints, strict=True)
    )
    return Scene(things, requirement.background or world.plain_background, category, requirement)


def _single_position(world: World, rng: np.random.Generator, word: str | None) -> tuple[float, float, float]:
    size = float(rng.uniform(*(dict(world.sizes)[word] if word else world.single_size)))
    reach = max(0.0, min(world.single_jitter, 0.5 - world.margin - HALF_EXTENT * size))
    x, y = rng.uniform(-reach, reach, 2)
    return 0.5 + float(x), 0.5 + float(y), size


def _pair_positions(world: World, rng: np.random.Generator, relation: Relation) -> list[tuple[float, float, float]]:
    """Draws both things' positions and sizes: a clear gap along the axis, a small offset across it."""
    first, second = (float(s) for s in rng.uniform(*world.pair_size, 2))
    slack = 1 - 2 * world.margin - world.gap - 2 * HALF_EXTENT * (first + second)
    before, between, _ = (float(s) * slack for s in rng.dirichlet((3.0, 3.0, 3.0)))
    near_size, far_size = (first, second) if relation in ("left", "above") else (second, first)
    near = world.margin + before + HALF_EXTENT * near_size
    far = near + HALF_EXTENT * (near_size + far_size) + world.gap + between
    along = (near, far) if relation in ("left", "above") else (far, near)
    middle = 0.5 + float(rng.uniform(-world.pair_jitter, world.pair_jitter))
    across = [middle + float(offset) for offset in rng.uniform(-world.pair_offset, world.pair_offset, 2)]
    if relation in ("left", "right"):
        return [(along[0], across[0], first), (along[1], across[1], second)]
    return [(across[0], along[0], first), (across[1], along[1], second)]


def _count_positions(world: World, rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    layouts = [layout for layout in world.count_layouts if len(layout) == count]
    if not layouts:
        allowed = ", ".join(str(len(layout)) for layout in world.count_layouts)
        raise WorldError(f"count: got {count}, this world counts to {allowed}")
    layout = layouts[int(rng.integers(len(layouts)))]
    size = float(rng.uniform(*world.count_size))
    jitter = rng.uniform(-world.count_jitter, world.count_jitter, (count, 2))
    sizes = size * rng.uniform(0.96, 1.0, count)
    return [(x + float(dx), y + float(dy), float(s)) for (x, y), (dx, dy), s in zip(layout, jitter, sizes, strict=True)]
