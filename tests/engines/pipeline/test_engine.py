"""The whole engine: against diffusers' pipeline from the same folder, and its guarantees for jobs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from numpy.typing import NDArray
from small_checkpoint import save_checkpoint

from engines.errors import JobError, OutOfMemoryError, OutputError
from engines.loader import load_engine
from engines.pipeline.engine import SprintEngine
from engines.pipeline.latent_cache import resized
from engines.types import Engine, Job

PROMPTS = ["a red circle", "A Cat, sleeping on a warm sunny windowsill", "", "三 green triangles 🌈", "a " * 400]


def job(number: int = 0, **changes: object) -> Job:
    return replace(Job(PROMPTS[number % len(PROMPTS)], seed=number, width=64, height=64), **changes)


def largest_difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = load_engine(str(folder), max_batch=8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def faithful(folder: Path) -> Engine:
    """Returns an engine with diffusers' schedule."""
    return load_engine(str(folder), schedule="diffusers")


def upstream_pixels(pipeline: SanaSprintPipeline, jobs: list[Job]) -> NDArray[np.uint8]:
    images = pipeline(
        prompt=[job.prompt for job in jobs],
        height=jobs[0].height,
        width=jobs[0].width,
        num_inference_steps=jobs[0].steps,
        intermediate_timesteps=1.3 if jobs[0].steps == 2 else None,
        guidance_scale=jobs[0].guidance_scale,
        generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
        use_resolution_binning=False,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("steps", "size"),
    [(1, (64, 64)), (1, (96, 64)), (2, (32, 128)), (2, (64, 64)), (3, (96, 64)), (4, (64, 64)), (4, (32, 128))],
)
def test_equals_diffusers(steps: int, size: tuple[int, int], faithful: Engine, upstream: SanaSprintPipeline) -> None:
    jobs = [job(seed, steps=steps, width=size[0], height=size[1], guidance_scale=3.7) for seed in range(5)]
    expected = upstream_pixels(upstream, jobs)
    assert expected.std() > 20, "the reference is too flat to tell anything"
    for image, wanted in zip(faithful.generate(jobs), expected, strict=True):
        assert image.pixels.shape == (size[1], size[0], 3)
        assert largest_difference(image.pixels, wanted) <= 1
        assert (image.pixels != wanted).mean() < 0.01  # rounding, not truncation


def test_equals_diffusers_with_a_positional_embedding(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "sprint", interpolation_scale=0.5)
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    engine = load_engine(str(folder))
    for width, height in ((64, 64), (64, 96)):
        jobs = [job(seed, width=width, height=height) for seed in range(2)]
        for image, wanted in zip(engine.generate(jobs), upstream_pixels(pipeline, jobs), strict=True):
            assert largest_difference(image.pixels, wanted) <= 1


@pytest.mark.parametrize("steps", [1, 4])
def test_a_job_is_the_same_alone_in_a_batch_and_at_another_place(steps: int, engine: Engine) -> None:
    jobs = [job(seed, steps=steps, guidance_scale=4 + seed / 8) for seed in range(8)]
    together = engine.generate(jobs)
    turned = engine.generate(jobs[::-1])[::-1]
    for one, image, elsewhere in zip(jobs, together, turned, strict=True):
        [alone] = engine.generate([one])
        assert largest_difference(image.pixels, alone.pixels) <= 1
        assert largest_difference(image.pixels, elsewhere.pixels) <= 1
        assert alone.pixels.std() > 10


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"prompt": "a blue square"}, {"guidance_scale": 9.0}, {"steps": 2}],
    ids=["seed", "prompt", "guidance", "steps"],
)
def test_everything_asked_for_matters(change: dict[str, object], engine: Engine) -> None:
    [before], [after] = engine.generate([job(1)]), engine.generate([job(1, **change)])
    assert largest_difference(before.pixels, after.pixels) > 10


def photo(height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_an_image_is_never_ignored_and_strength_always_matters(steps: int, engine: Engine) -> None:
    def run(image: NDArray[np.uint8], strength: float) -> NDArray[np.uint8]:
        return engine.generate([job(1, steps=steps, image=image, strength=strength)])[0].pixels

    for strength in (0.0, 0.5, 1.0):
        assert largest_difference(run(photo(), strength), run(255 - photo(), strength)) > 1
    assert largest_difference(run(photo(), 0.5), run(photo(), 0.55)) > 1


def test_strength_zero_is_the_image_through_the_autoencoder(engine: Engine, upstream: SanaSprintPipeline) -> None:
    [ours] = engine.generate([job(1, image=photo(), strength=0.0)])
    pixels = torch.tensor(photo()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        decoded = upstream.vae.decode(upstream.vae.encode(pixels).latent).sample[0]
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert largest_difference(ours.pixels, expected) <= 1


def test_images_of_a_batch_keep_their_own_strength_and_place(engine: Engine) -> None:
    jobs = [job(i, image=photo(40 + i, 90), strength=i / 3, steps=2) for i in range(4)]
    for one, image in zip(jobs, engine.generate(jobs), strict=True):
        assert largest_difference(image.pixels, engine.generate([one])[0].pixels) <= 1


def test_resizing_keeps_content_and_range() -> None:
    halves = np.zeros((50, 80, 3), np.uint8)
    halves[:, 40:] = 255
    small = resized(halves, 32, 16).numpy()
    assert small.shape == (16, 32, 3)
    assert small.dtype == np.uint8
    assert (small[:, :13] < 10).all()
    assert (small[:, 19:] > 245).all()
    assert np.array_equal(resized(halves, 80, 50).numpy(), halves)


def test_reports_what_happened(engine: Engine) -> None:
    first, second = engine.generate([job(0, prompt="never seen"), job(1, prompt="word " * 400)])
    assert (first.prompt_truncated, second.prompt_truncated) == (False, True)
    assert not first.prompt_cached
    [again] = engine.generate([job(5, prompt=" Never seen")])
    assert again.prompt_cached
    assert (first.bucket, again.bucket) == (2, 1)
    assert first.stages.denoise > 0
    assert first.stages.decode > 0


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([], "got 0 jobs, this engine runs 1 to 8"),
        ([job()] * 9, "got 9 jobs"),
        ([job(width=72)], "got 72x64, which this engine cannot run; nearest: 64x64"),
        ([job(width=65536, height=65536)], "got 65536x65536"),
        ([job(steps=5)], "num_inference_steps: got 5"),
        ([job(seed=-1)], "seed: got -1"),
        ([job(), job(width=96)], "batch key"),
        ([job(), job(image=photo())], "batch key"),
        ([job(image=photo(), strength=1.5)], r"strength: got 1\.5, allowed 0 to 1"),
        ([job(control_image=photo())], "control_image: got control, this engine runs image, text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_jobs_outside_the_limits_are_refused(jobs: list[Job], message: str, small_checkpoint: Path) -> None:
    with pytest.raises(JobError, match=message):
        load_engine(str(small_checkpoint)).generate(jobs)


def broken(engine: Engine, **modules: Callable[..., object]) -> SprintEngine:
    """Returns the engine with some modules replaced."""
    return SprintEngine(replace(engine._modules, **modules), engine._space, engine.info, engine.limits)


def test_nan_is_an_error_that_names_the_job(engine: Engine) -> None:
    def poisoned(*given: torch.Tensor | None) -> torch.Tensor:
        velocity = engine._modules.transformer(*given)
        velocity[1] = float("nan")
        return velocity

    with pytest.raises(OutputError, match="NaN or infinity for seed 1 of a batch of 3"):
        broken(engine, transformer=poisoned).generate([job(0), job(1), job(2)])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_lack_of_memory_is_told_apart(error: Exception, engine: Engine) -> None:
    def exhausted(*_: object) -> torch.Tensor:
        raise error

    with pytest.raises(OutOfMemoryError, match="no memory for a batch of 2 at 64x64"):
        broken(engine, decoder=exhausted).generate([job(0), job(1)])
    with pytest.raises(RuntimeError, match="another matter"):
        broken(engine, decoder=lambda *_: (_ for _ in ()).throw(RuntimeError("another matter"))).generate([job(0)])
