"""Prompts are held out and balanced, and reports are right for generators of known scores."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from distill.evaluation.scores import Prompt, engine_generator, evaluate, evaluation_prompts
from distill.world.captions import parse_caption
from distill.world.rendering import CATEGORIES, World, render
from distill.world.scenes import WorldError, combinations, scene_for
from engines.fake import FakeEngine
from engines.types import Pixels

WORLD = World()


def paint(texts: list[str], seeds: list[int]) -> list[Pixels]:
    """Renders what each caption asks for."""
    images = []
    for text, seed in zip(texts, seeds, strict=True):
        scene = scene_for(WORLD, np.random.default_rng(seed), parse_caption(text), "")
        images.append(render(WORLD, scene, 128))
    return images


def test_prompts_are_held_out_balanced_and_reproducible() -> None:
    prompts = evaluation_prompts(510)
    assert set(Counter(prompt.category for prompt in prompts).values()) == {85}
    assert prompts == evaluation_prompts(510)
    assert prompts[:60] != evaluation_prompts(60, seed=1)
    assert len({prompt.text for prompt in prompts}) >= 500
    for prompt in prompts:
        assert parse_caption(prompt.text) == prompt.requirement
        if prompt.category in ("single_object", "colors"):
            assert prompt.requirement in combinations(WORLD, prompt.category, "held_out")


def test_a_perfect_generator_scores_one() -> None:
    report = evaluate(paint, evaluation_prompts(60), seeds=(0, 1))
    assert report.mean >= 0.99
    assert set(report.categories) == set(CATEGORIES)


def test_a_generator_that_ignores_its_prompts_scores_near_zero() -> None:
    report = evaluate(lambda texts, seeds: paint(texts[1:] + texts[:1], seeds), evaluation_prompts(60))
    assert report.mean < 0.1
    assert sum(report.mistakes.values()) > 10


def test_scores_are_means_over_categories_with_their_spread_over_seeds() -> None:
    prompts = [Prompt(t, c, parse_caption(t)) for t, c in (("a red circle", "colors"), ("two red circles", "counting"))]

    def right_on_seed_zero(texts: list[str], seeds: list[int]) -> list[Pixels]:
        blank = np.full((128, 128, 3), 255, np.uint8)
        return paint(texts, seeds) if seeds[0] == 0 else [paint(texts, seeds)[0], blank]

    report = evaluate(right_on_seed_zero, prompts, seeds=(0, 1))
    assert report.categories == {"counting": 0.5, "colors": 1.0}
    assert report.mean_by_seed == (1.0, 0.5)
    assert report.mean == 0.75
    assert report.spread == pytest.approx(0.5 / 2**0.5)
    assert report.category_spread["colors"] == 0.0
    assert report.mistakes == {"counting: seen: nothing; asked: red circle, red circle": 1}
    assert "| **mean** | **0.750** | 0.354 |" in report.table()
    assert json.loads(json.dumps(asdict(report)))["mean"] == 0.75


def test_every_image_has_its_own_noise() -> None:
    seen: list[int] = []

    def note(texts: list[str], seeds: list[int]) -> list[Pixels]:
        seen.extend(seeds)
        return paint(texts, seeds)

    evaluate(note, evaluation_prompts(6), seeds=(0, 1, 2))
    assert len(set(seen)) == 18


def test_an_engine_is_asked_in_batches_at_its_own_size() -> None:
    engine = FakeEngine()
    generate = engine_generator(engine, steps=1, guidance_scale=4.5)
    count = engine.limits.max_batch + 1
    images = list(generate(["a red circle"] * count, list(range(count))))
    width, height = engine.limits.default_size
    assert [image.shape for image in images] == [(height, width, 3)] * count
    smaller = engine_generator(engine, steps=1, guidance_scale=4.5, size=96)
    assert next(iter(smaller(["a red circle"], [0]))).shape == (96, 96, 3)


def test_too_few_images_and_no_prompts_are_refused() -> None:
    with pytest.raises(WorldError, match="got 1 images for 6 prompts"):
        evaluate(lambda texts, seeds: paint(texts[:1], seeds[:1]), evaluation_prompts(6))
    with pytest.raises(WorldError, match="0 prompts"):
        evaluate(paint, [])
