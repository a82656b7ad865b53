"""The world renders its captions, holds combinations out from training, and resumes its stream."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from distill.world.captions import caption_of, parse_caption
from distill.world.rendering import CATEGORIES, Scene, Thing, World, batches, render, sample_scene, vocabulary
from distill.world.scenes import DRAWABLE_SHAPES, OPPOSITE, Kind, Requirement, WorldError, combinations

WORLD = World()


def scenes(category: str | None, split: str, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(WORLD, rng, category, split) for _ in range(count)]


def canonical(category: str, requirement: Requirement) -> tuple[object, ...]:
    """Returns the identity of a combination, independently of the world's code."""
    if category in ("single_object", "colors"):
        return requirement.things, requirement.size, requirement.background
    if category == "counting":
        return requirement.things
    if requirement.relation in ("right", "below"):
        return OPPOSITE[requirement.relation], requirement.things[::-1]
    return requirement.relation, requirement.things if requirement.relation else frozenset(requirement.things)


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_never_emits_what_is_held_out(category: str) -> None:
    held_out = {canonical(category, s.requirement) for s in scenes(category, "held_out", 1500)}
    trained = {canonical(category, s.requirement) for s in scenes(category, "train", 4000, seed=1)}
    assert len(held_out) >= 6
    assert not held_out & trained
    assert 0.05 < len(combinations(WORLD, category, "held_out")) / len(trained) < 0.2


def test_one_pair_is_held_out_from_both_categories_of_pairs() -> None:
    trained = {
        canonical("two_object", s.requirement) for c in ("two_object", "color_attr") for s in scenes(c, "train", 3000)
    }
    assert not trained & {canonical("color_attr", s.requirement) for s in scenes("color_attr", "held_out", 300)}


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a red circle on a white background",
        "a red circle on a black background",
        "a red circle to the left of a blue square",
        "a red circle and a blue square",
        "three green triangles",
    ],
)
def test_examples_of_the_documents_are_trained_on(text: str) -> None:
    requirement = parse_caption(text)
    assert not any(requirement in combinations(WORLD, c, "held_out") for c in CATEGORIES)


def test_captions_mean_their_scene_and_use_the_vocabulary_alone() -> None:
    rng, words, known = np.random.default_rng(2), set[str](), set(vocabulary(WORLD))
    for scene in scenes(None, "train", 3000) + scenes(None, "held_out", 500):
        text = caption_of(scene.requirement, rng)
        assert parse_caption(text) == scene.requirement
        assert len(text.split()) <= 20
        words |= set(text.split())
    assert words == known
    assert len(known) < 80
    assert vocabulary(WORLD) == sorted(known)


def test_every_word_appears_in_training() -> None:
    words = {word for _, texts in islice(batches(WORLD, 32, 64, seed=3), 30) for text in texts for word in text.split()}
    assert words == set(vocabulary(WORLD))


def test_stream_is_reproducible_and_resumes() -> None:
    stream = list(islice(batches(WORLD, 64, 3, seed=5), 4))
    again = list(islice(batches(WORLD, 64, 3, seed=5, start=2), 2))
    for (pixels, texts), (pixels_again, texts_again) in zip(stream[2:], again, strict=True):
        assert texts == texts_again
        np.testing.assert_array_equal(pixels, pixels_again)
    assert stream[0][1] != next(batches(WORLD, 64, 3, seed=6))[1]
    assert stream[0][0].shape == (3, 64, 64, 3)
    assert stream[0][0].dtype == np.uint8


def inside(shape: str, angle: float) -> np.ndarray:
    """Returns the share of every pixel inside one shape of 100 pixels at (0.4, 0.55): [200,200]."""
    scene = Scene((Thing(shape, "red", 0.4, 0.55, 0.5, angle),), "black", "colors", Requirement((Kind("red", shape),)))
    red, dark = WORLD.rgb("red")[0], WORLD.rgb("black")[0]
    return (render(WORLD, scene, 200)[..., 0].astype(float) - dark) / (red - dark)


@pytest.mark.parametrize("angle", [0.0, 8.0, 45.0])
@pytest.mark.parametrize(
    ("shape", "area"), [("circle", 0.7854), ("square", 0.81), ("triangle", 0.47739), ("diamond", 0.6728)]
)
def test_shapes_are_drawn_whole(shape: str, area: float, angle: float) -> None:
    assert inside(shape, angle).sum() == pytest.approx(area * 100**2, rel=0.002)


@pytest.mark.parametrize("shape", DRAWABLE_SHAPES)
def test_shapes_stand_where_they_should(shape: str) -> None:
    rows, columns = np.nonzero(inside(shape, 0.0) > 0.5)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(80, abs=1)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(110, abs=1)


def test_things_are_whole_and_apart() -> None:
    for scene in scenes(None, "train", 1500):
        for i, thing in enumerate(scene.things):
            assert min(thing.x, thing.y) - thing.size / 2 >= 0.02
            assert max(thing.x, thing.y) + thing.size / 2 <= 0.98
            for other in scene.things[i + 1 :]:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart >= (thing.size + other.size) / 2 + 0.04


def test_unnamed_background_is_white() -> None:
    for scene in scenes(None, "train", 300):
        assert scene.background == (scene.requirement.background or "white")


def test_another_world_is_one_change() -> None:
    world = World(colours=(("red", (220, 30, 30)), ("teal", (0, 128, 128))), shapes=("circle", "square"))
    pixels, texts = next(batches(world, 32, 64, seed=0))
    assert pixels.shape == (64, 32, 32, 3)
    assert any("teal" in text for text in texts)
    assert not any("triangle" in text for text in texts)
    assert "teal" in vocabulary(world)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("circle", "star")}, "star"),
        ({"plain_background": "pink"}, "pink"),
        ({"category_weights": (1.0,)}, "sum to 1"),
        ({"pair_size": (0.3, 0.5)}, "do not fit"),
        ({"count_layouts": (((0.5, 0.5),),)}, "count_layouts"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        replace(WORLD, **change)


@pytest.mark.parametrize(
    "text", ["", "a cat", "a red", "a red circle and", "seven red circles", "a red circle on pink"]
)
def test_a_foreign_caption_is_refused(text: str) -> None:
    with pytest.raises(WorldError, match="caption: got"):
        parse_caption(text)


def test_captions_are_read_in_any_case_and_with_a_full_stop() -> None:
    assert parse_caption("A Red circle, on white.") == Requirement((Kind("red", "circle"),), background="white")


def test_unknown_category_is_refused() -> None:
    with pytest.raises(WorldError, match="single_object"):
        sample_scene(WORLD, np.random.default_rng(0), "cats")
