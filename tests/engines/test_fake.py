"""The fake engine: expected pixels, limits, delays and injected faults."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from engines.errors import JobError, OutOfMemoryError, OutputError
from engines.fake import FakeEngine, FaultInjection, expected_pixels
from engines.types import Job, Pixels

JOB = Job("a red circle", seed=7, width=64, height=32)


def solid(value: int, height: int = 16, width: int = 16) -> Pixels:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_pixels_are_the_foretold_ones_in_order() -> None:
    jobs = [replace(JOB, seed=seed) for seed in range(5)]
    images = FakeEngine().generate(jobs)
    for job, image in zip(jobs, images, strict=True):
        assert image.pixels.shape == (32, 64, 3)
        assert image.pixels.dtype == np.uint8
        np.testing.assert_array_equal(image.pixels, expected_pixels(job))


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, prompt="a red circle "),
        replace(JOB, seed=8),
        replace(JOB, steps=2),
        replace(JOB, guidance_scale=5.0),
        replace(JOB, image=solid(255)),
        replace(JOB, image=solid(255), strength=0.9),
        replace(JOB, control_image=solid(200)),
        replace(JOB, control_image=solid(200), control_scale=0.9),
    ],
)
def test_whatever_a_job_says_shows(other: Job) -> None:
    difference = np.abs(expected_pixels(JOB).astype(int) - expected_pixels(other).astype(int))
    assert difference.max() > 8


def test_strength_and_strokes_have_their_ends() -> None:
    whole = replace(JOB, image=solid(200), strength=1.0)
    np.testing.assert_array_equal(expected_pixels(whole), expected_pixels(JOB))
    none = replace(JOB, image=solid(200), strength=0.0)
    assert (expected_pixels(none) == 200).all()
    assert (expected_pixels(replace(JOB, control_image=solid(255))) == 255).all()


def test_batches_run_in_padded_buckets_and_prompts_are_cached() -> None:
    engine = FakeEngine(max_batch=8)
    images = engine.generate([JOB, replace(JOB, prompt="b"), replace(JOB, prompt="c")])
    assert [image.bucket for image in images] == [4, 4, 4]
    assert [image.prompt_cached for image in images] == [False, False, False]
    assert [image.prompt_cached for image in engine.generate([JOB])] == [True]
    assert engine.batches == [3, 1]
    assert engine.generate([replace(JOB, prompt="word " * 301)])[0].prompt_truncated


def test_stages_add_up_to_the_delay() -> None:
    engine = FakeEngine(delay_s=0.02, delay_per_job_s=0.005)
    stages = engine.generate([JOB, JOB])[0].stages
    assert stages.text + stages.denoise + stages.decode >= 0.03


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([], "got 0"),
        ([JOB] * 9, "got 9"),
        ([JOB, replace(JOB, width=96)], "2 batch keys"),
        ([replace(JOB, width=100)], "got 100x32"),
        ([replace(JOB, steps=5)], "num_inference_steps"),
    ],
)
def test_jobs_outside_the_limits_are_refused(jobs: list[Job], words: str) -> None:
    with pytest.raises(JobError, match=words):
        FakeEngine(max_batch=8).generate(jobs)


def test_conditioning_is_honoured() -> None:
    text_only = FakeEngine(conditioning=frozenset({"text"}))
    with pytest.raises(JobError, match="image: got image, this engine runs text"):
        text_only.generate([replace(JOB, image=solid(1))])


def test_faults_come_as_planned() -> None:
    plan = FaultInjection(out_of_memory_above=2, raise_on_calls=frozenset({1}), broken_from_call=4)
    engine = FakeEngine(faults=plan)
    with pytest.raises(OutOfMemoryError, match="batch of 3"):
        engine.generate([JOB] * 3)
    with pytest.raises(RuntimeError, match="call 1"):
        engine.generate([JOB])
    with pytest.raises(RuntimeError, match="a prompt"):
        engine.generate([JOB, replace(JOB, prompt="x [[raise]]")])
    with pytest.raises(OutputError, match="NaN"):
        engine.generate([replace(JOB, prompt="x [[nan]]")])
    with pytest.raises(RuntimeError, match="broken, call 4"):
        engine.generate([JOB])


def test_prompts_ask_for_faults() -> None:
    engine = FakeEngine()
    once = replace(JOB, prompt="x [[once]]")
    with pytest.raises(RuntimeError, match="one failure"):
        engine.generate([once])
    np.testing.assert_array_equal(engine.generate([once])[0].pixels, expected_pixels(once))
    large = replace(JOB, prompt="x [[memory]]")
    with pytest.raises(OutOfMemoryError, match="batch of 2"):
        engine.generate([JOB, large])
    assert engine.generate([large])[0].pixels.any()
    assert not engine.generate([replace(JOB, prompt="x [[black]]")])[0].pixels.any()
    with pytest.raises(RuntimeError, match="broken"):
        engine.generate([replace(JOB, prompt="x [[break]]")])
    with pytest.raises(RuntimeError, match="broken"):
        engine.generate([JOB])


def test_a_hang_ends_when_the_engine_is_closed() -> None:
    engine = FakeEngine()
    failed = threading.Event()

    def call() -> None:
        with pytest.raises(RuntimeError, match="hanging"):
            engine.generate([replace(JOB, prompt="[[hang]]")])
        failed.set()

    thread = threading.Thread(target=call)
    thread.start()
    engine.close()
    thread.join(10)
    assert failed.is_set()
