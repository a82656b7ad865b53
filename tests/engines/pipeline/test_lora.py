"""Adapters by request: batch mates do not affect a job; backends without them fuse or refuse adapters."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoint import EVERYWHERE, random_factors, save_lora

from engines.backends.cuda.graphs import EagerReplay
from engines.checkpoints.checkpoint import open_checkpoint
from engines.errors import BackendError, JobError
from engines.loader import load_engine
from engines.pipeline.engine import SprintEngine
from engines.types import AdapterOption, Engine, Job

PLAIN = Job("a red circle", seed=7, width=64, height=64)
CHOICES = [(), (("one", 1.0),), (("two", -0.7),), (("two", 0.5), ("one", 0.25)), ()]


@pytest.fixture(scope="module")
def options(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterOption]:
    """Returns two adapters of different ranks and modules."""
    like, place = open_checkpoint(str(folder)).load_transformer(torch.float32, torch.device("cpu")), tmp_path_factory
    made = place.mktemp("lora")
    one = save_lora(made / "one.safetensors", random_factors(like, EVERYWHERE, 3, 1))
    two = save_lora(made / "two.safetensors", random_factors(like, EVERYWHERE[-6:], 5, 2))
    return [AdapterOption("one", str(one)), AdapterOption("two", str(two))]


@pytest.fixture(scope="module")
def engine(small_checkpoint: Path, options: list[AdapterOption]) -> Iterator[Engine]:
    engine = load_engine(str(small_checkpoint), precision="fp32", lora=options)
    yield engine
    engine.close()


def pixels(engine: Engine, *jobs: Job) -> list[np.ndarray]:
    return [image.pixels.astype(int) for image in engine.generate(jobs)]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def mixed(engine: Engine) -> None:
    jobs = [replace(PLAIN, lora=lora, seed=seed) for seed, lora in enumerate(CHOICES)]
    for job, together in zip(jobs, pixels(engine, *jobs), strict=True):
        (alone,) = pixels(engine, job)
        assert apart(alone, together) <= 1


def test_jobs_with_two_with_one_and_with_none_share_a_batch(engine: Engine) -> None:
    mixed(engine)


def test_a_job_by_request_equals_the_adapter_fused(
    engine: Engine, small_checkpoint: Path, options: list[AdapterOption]
) -> None:
    (plain,) = pixels(engine, PLAIN)
    for lora in CHOICES[1:4]:
        scales = dict(lora)
        fixed = [one._replace(scale=scales[one.name]) for one in options if one.name in scales]
        (expected,) = pixels(load_engine(str(small_checkpoint), precision="fp32", lora=fixed), PLAIN)
        (found,) = pixels(engine, replace(PLAIN, lora=lora))
        assert apart(expected, found) <= 1
        assert apart(plain, found) > 20


def test_without_a_choice_it_draws_as_without_adapters(engine: Engine, small_checkpoint: Path) -> None:
    (expected,) = pixels(load_engine(str(small_checkpoint), precision="fp32"), PLAIN)
    pixels(engine, replace(PLAIN, lora=(("one", 1.0),)))  # must not affect the next image
    (found,) = pixels(engine, PLAIN)
    assert apart(expected, found) == 0


def test_bf16_on_a_cpu_and_captured_graphs_take_them_too(small_checkpoint: Path, options: list[AdapterOption]) -> None:
    mixed(load_engine(str(small_checkpoint), precision="bf16", lora=options))
    captured = load_engine(
        str(small_checkpoint), precision="fp32", backend="cuda-graph", recorder=EagerReplay(), max_batch=8, lora=options
    )
    captured.warmup()
    mixed(captured)
    assert isinstance(captured, SprintEngine)
    made = captured.generate([replace(PLAIN, lora=CHOICES[3]), PLAIN])
    assert not any(image.uncaptured for image in made)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ((("three", 1.0),), "lora: got 'three', allowed: one, two"),
        ((("one", 4.5),), "lora: got 4.5 for 'one', allowed: a number from -4 to 4"),
        ((("one", float("nan")),), "lora: got nan for 'one'"),
        ((("one", 1.0), ("one", 1.0)), "at most 2 at once, each once"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(engine: Engine, lora: tuple[tuple[str, float], ...], told: str) -> None:
    with pytest.raises(JobError, match=told):
        engine.generate([replace(PLAIN, lora=lora)])


def test_backends_that_fuse_alone_refuse_one_without_a_scale(
    small_checkpoint: Path, options: list[AdapterOption]
) -> None:
    with pytest.raises(BackendError, match=r"lora one: compiled takes adapters with a scale alone.*one\.safetensors:1"):
        load_engine(str(small_checkpoint), backend="compiled", lora=options)
