"""The judge accepts right renderings, also soft ones, and refuses wrong ones."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from distill.world.captions import caption_of, parse_caption
from distill.world.judge import detect_things, judge
from distill.world.rendering import CATEGORIES, Scene, Thing, World, render, sample_scene
from distill.world.scenes import Kind, Relation, Requirement, WorldError, scene_for
from engines.types import Pixels

WORLD = World()
Change = Callable[[Scene, np.random.Generator], Pixels]


def draw(scene: Scene, size: int = 256) -> Pixels:
    return render(WORLD, scene, size)


def share_right(category: str, size: int, count: int, spoil: Callable[[Pixels, np.random.Generator], Pixels]) -> float:
    rng = np.random.default_rng(size)
    scenes = [sample_scene(WORLD, rng, category) for _ in range(count)]
    return float(np.mean([judge(spoil(draw(scene, size), rng), scene.requirement).correct for scene in scenes]))


def soft(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)), np.float32)
    return np.clip(blurred + rng.normal(0, 6, blurred.shape), 0, 255).astype(np.uint8)


def faded(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    shift = rng.uniform(-25, 25, 3)
    return np.clip(pixels + shift, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_true_renderings_are_right(category: str, size: int) -> None:
    assert share_right(category, size, 50, lambda pixels, _: pixels) >= 0.99


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("size", [128, 256])
def test_soft_and_noisy_renderings_are_right(category: str, size: int) -> None:
    assert share_right(category, size, 35, soft) >= 0.97


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_shift_of_all_colours_is_forgiven(category: str) -> None:
    assert share_right(category, 256, 34, faded) >= 0.97


def test_other_sizes_and_aspect_ratios_are_judged() -> None:
    scene = sample_scene(WORLD, np.random.default_rng(4), "position")
    for size in (1024, 300):
        assert judge(draw(scene, size), scene.requirement).correct
    wide = np.pad(draw(scene, 256), ((0, 0), (64, 64), (0, 0)), mode="edge")
    assert judge(wide, scene.requirement).correct


def other(names: list[str], but: str, rng: np.random.Generator) -> str:
    left = [name for name in names if name != but]
    return left[int(rng.integers(len(left)))]


def with_thing(scene: Scene, index: int, **change: object) -> Scene:
    things = list(scene.things)
    things[index] = replace(things[index], **change)
    return replace(scene, things=tuple(things))


def wrong_colour(scene: Scene, rng: np.random.Generator) -> Pixels:
    index = int(rng.integers(len(scene.things)))
    colours = [name for name, _ in WORLD.colours]
    return draw(with_thing(scene, index, colour=other(colours, scene.things[index].colour, rng)))


def wrong_shape(scene: Scene, rng: np.random.Generator) -> Pixels:
    index = int(rng.integers(len(scene.things)))
    return draw(with_thing(scene, index, shape=other(list(WORLD.shapes), scene.things[index].shape, rng)))


def missing(scene: Scene, rng: np.random.Generator) -> Pixels:
    gone = int(rng.integers(len(scene.things)))
    return draw(replace(scene, things=tuple(t for i, t in enumerate(scene.things) if i != gone)))


def one_more(scene: Scene, _: np.random.Generator) -> Pixels:
    first = scene.things[0]
    x = 0.13 if first.x > 0.5 else 0.87
    y = 0.13 if first.y > 0.5 else 0.87
    return draw(replace(scene, things=(*scene.things, Thing(first.shape, first.colour, x, y, 0.15))))


def wrong_background(scene: Scene, rng: np.random.Generator) -> Pixels:
    return draw(replace(scene, background=other([name for name, _ in WORLD.backgrounds], scene.background, rng)))


def cut(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Removes a third or more of one thing."""
    pixels, thing = draw(scene), scene.things[int(rng.integers(len(scene.things)))]
    half, part = thing.size * 128, thing.size * 256 * rng.uniform(0.33, 0.6)
    left, top = int(thing.x * 256 - half * 1.17), int(thing.y * 256 - half * 1.17)
    box = (slice(top, int(top + 2.34 * half)), slice(left, int(left + 0.17 * half + part)))
    pixels[box if rng.random() < 0.5 else (slice(top, int(top + 0.17 * half + part)), slice(left, None))] = pixels[0, 0]
    return pixels


def bridged(scene: Scene, _: np.random.Generator) -> Pixels:
    """Connects two things."""
    pixels, (first, second) = draw(scene), scene.things[:2]
    for share in np.linspace(0, 1, 60):
        x, y = (int(256 * ((1 - share) * a + share * b)) for a, b in ((first.x, second.x), (first.y, second.y)))
        pixels[y - 6 : y + 6, x - 6 : x + 6] = WORLD.rgb(first.colour)
    return pixels


def blob(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Draws the right colour in no shape."""
    y, x = np.mgrid[:256, :256] - 128.0
    angle, waves = np.arctan2(y, x), np.zeros_like(x)
    for wave in range(2, 6):
        waves += rng.normal(0, 0.16) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    inside = np.hypot(x, y) < 55 * (1 + waves + 0.2 * np.cos(3 * angle))
    pixels = draw(replace(scene, things=()))
    pixels[inside] = WORLD.rgb(scene.things[0].colour)
    return pixels


def two_coloured(scene: Scene, rng: np.random.Generator) -> Pixels:
    thing, colours = scene.things[0], [name for name, _ in WORLD.colours]
    second = draw(with_thing(scene, 0, colour=other(colours, thing.colour, rng)))
    pixels, middle = draw(scene), int(thing.x * 256)
    pixels[:, middle:] = second[:, middle:]
    return pixels


def hollow(scene: Scene, _: np.random.Generator) -> Pixels:
    pixels, thing = draw(scene), scene.things[0]
    y, x = np.mgrid[:256, :256] + 0.5
    pixels[np.hypot(x - thing.x * 256, y - thing.y * 256) < 0.18 * thing.size * 256] = pixels[0, 0]
    return pixels


def stretched(scene: Scene, rng: np.random.Generator) -> Pixels:
    columns = np.clip((np.arange(256) - 128) / rng.uniform(1.25, 1.6) + 128, 0, 255).astype(int)
    return draw(scene)[:, columns] if rng.random() < 0.5 else draw(scene)[columns]


def torn(scene: Scene, _: np.random.Generator) -> Pixels:
    """Changes the background half-way."""
    pixels = draw(scene)
    pixels[128:][(pixels[128:] == pixels[0, 0]).all(-1)] = (200, 120, 60)
    return pixels


def littered(scene: Scene, rng: np.random.Generator) -> Pixels:
    pixels = draw(scene)
    for y, x in rng.integers(8, 244, (40, 2)):
        pixels[y : y + 8, x : x + 8] = (255, 0, 255)
    return pixels


def noise(_: Scene, rng: np.random.Generator) -> Pixels:
    coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((16, 16, 1), np.uint8))


ANY = CATEGORIES
SINGLE = ("single_object", "colors")
WRONG: list[tuple[Change, tuple[str, ...]]] = [
    (wrong_colour, ANY),
    (wrong_shape, ANY),
    (missing, ANY),
    (one_more, SINGLE),
    (cut, ANY),
    (bridged, ("two_object", "counting", "position", "color_attr")),
    (blob, SINGLE),
    (two_coloured, ANY),
    (hollow, ANY),
    (stretched, SINGLE),
    (torn, ANY),
    (littered, ANY),
    (noise, ANY),
]


@pytest.mark.parametrize(("change", "categories"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_wrong_images_are_refused(change: Change, categories: tuple[str, ...]) -> None:
    rng = np.random.default_rng(11)
    scenes = [sample_scene(WORLD, rng, categories[i % len(categories)]) for i in range(48)]
    verdicts = [judge(change(scene, rng), scene.requirement) for scene in scenes]
    assert np.mean([not verdict.correct for verdict in verdicts]) >= 0.95
    assert all(verdict.reasons for verdict in verdicts if not verdict.correct)


def test_a_wrong_background_is_refused_where_it_was_named() -> None:
    rng = np.random.default_rng(12)
    scenes = [s for s in (sample_scene(WORLD, rng) for _ in range(120)) if s.requirement.background]
    assert not any(judge(wrong_background(scene, rng), scene.requirement).correct for scene in scenes)
    free = [replace(scene, requirement=replace(scene.requirement, background=None)) for scene in scenes[:20]]
    assert all(judge(wrong_background(scene, rng), scene.requirement).correct for scene in free)


@pytest.mark.parametrize("asked_for", WORLD.relations)
@pytest.mark.parametrize("drawn", WORLD.relations)
def test_relations(asked_for: Relation, drawn: Relation) -> None:
    rng, pair = np.random.default_rng(13), (Kind("red", "circle"), Kind("blue", "square"))
    for _ in range(10):
        scene = scene_for(WORLD, rng, Requirement(pair, relation=drawn), "position")
        assert judge(draw(scene, 128), replace(scene.requirement, relation=asked_for)).correct == (asked_for == drawn)
        swapped = replace(scene.requirement, things=pair[::-1], relation=asked_for)
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        assert judge(draw(scene, 128), swapped).correct == (opposite[asked_for] == drawn)


def test_swapped_colours_are_refused() -> None:
    rng = np.random.default_rng(14)
    for _ in range(40):
        scene = sample_scene(WORLD, rng, "color_attr")
        (first, second) = scene.requirement.things
        things = (Kind(second.colour, first.shape), Kind(first.colour, second.shape))
        crossed = replace(scene.requirement, things=things)
        assert not judge(draw(scene), crossed).correct


def test_named_sizes_are_judged() -> None:
    rng = np.random.default_rng(15)
    sizes = [None, *(name for name, _ in WORLD.sizes)]
    for drawn in sizes:
        scene = scene_for(WORLD, rng, Requirement((Kind("green", "triangle"),), size=drawn), "single_object")
        for size in sizes[1:]:
            assert judge(draw(scene), replace(scene.requirement, size=size)).correct == (size == drawn)


def test_a_caption_is_enough_to_judge_by() -> None:
    rng = np.random.default_rng(16)
    for _ in range(60):
        scene = sample_scene(WORLD, rng)
        assert judge(draw(scene), parse_caption(caption_of(scene.requirement, rng))).correct


def test_verdict_lists_the_things_and_the_mistakes() -> None:
    requirement = parse_caption("a red circle to the left of a blue square on gray")
    scene = scene_for(WORLD, np.random.default_rng(17), requirement, "position")
    verdict = judge(draw(scene), replace(requirement, relation="right", background="white"))
    assert verdict.background == "gray"
    assert {(thing.colour, thing.shape) for thing in verdict.things} == {("red", "circle"), ("blue", "square")}
    seen = next(thing for thing in verdict.things if thing.colour == "red")
    assert seen.size == pytest.approx(scene.things[0].size, rel=0.03)
    assert seen.box[0] + seen.box[2] == pytest.approx(2 * scene.things[0].x, abs=0.03)
    assert verdict.reasons == (
        "the background is gray, asked was white",
        "the first thing stands left of the second, asked was right",
    )


def test_a_background_of_two_colours_is_none() -> None:
    pixels = np.full((256, 256, 3), 255, np.uint8)
    assert detect_things(pixels)[0] == "white"
    pixels[176:] = WORLD.rgb("gray")
    assert detect_things(pixels)[0] is None


@pytest.mark.parametrize(("exponent", "shape"), [(2.0, "circle"), (4.0, None), (8.0, "square")])
def test_rounded_corners_are_forgiven_up_to_where_a_square_ends(exponent: float, shape: str | None) -> None:
    pixels = np.full((256, 256, 3), 255, np.uint8)
    y, x = np.abs(np.mgrid[:256, :256] - 127.5) / 50
    pixels[x**exponent + y**exponent < 1] = WORLD.rgb("red")
    assert [thing.shape for thing in detect_things(pixels)[1]] == [shape]


@pytest.mark.parametrize(("exponent", "shape"), [(1.0, "diamond"), (1.5, None), (2.0, "circle"), (8.0, "square")])
def test_a_diamond_is_no_other_shape(exponent: float, shape: str | None) -> None:
    pixels = np.full((256, 256, 3), 255, np.uint8)
    y, x = np.abs(np.mgrid[:256, :256] - 127.5) / 50
    pixels[x**exponent + y**exponent < 1] = WORLD.rgb("red")
    wider = replace(WORLD, shapes=(*WORLD.shapes, "diamond"))
    assert [thing.shape for thing in detect_things(pixels, wider)[1]] == [shape]
    if shape == "diamond":
        assert [thing.shape for thing in detect_things(pixels)[1]] == [None]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_judge_that_knows_diamonds_still_knows_the_rest(category: str) -> None:
    wider = replace(WORLD, shapes=(*WORLD.shapes, "diamond"))
    rng = np.random.default_rng(18)
    scenes = [sample_scene(wider, rng, category) for _ in range(40)]
    correct = [judge(soft(render(wider, scene, 256), rng), scene.requirement, wider).correct for scene in scenes]
    assert np.mean(correct) >= 0.95


def test_an_empty_image_shows_nothing() -> None:
    background, things, speck_share = detect_things(np.full((128, 128, 3), 255, np.uint8))
    assert (background, things, speck_share) == ("white", (), 0.0)


@pytest.mark.parametrize(
    "pixels", [np.zeros((32, 32, 3), np.uint8), np.zeros((128, 128), np.uint8), np.zeros((128, 128, 3), np.float32)]
)
def test_arrays_of_other_shapes_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(WorldError, match="pixels: got"):
        detect_things(pixels)
