"""One small checkpoint for all tests of the engine, and upstream's pipeline on it."""

from pathlib import Path

import pytest
from small_checkpoint import save_checkpoint, with_settings


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only by agreement: a test that breaks it copies it first."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sprint")


@pytest.fixture(scope="session")
def upstream(folder: Path) -> object:
    from diffusers import SanaSprintPipeline

    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def small_pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, made for 64x64."""
    return with_settings(folder, tmp_path_factory.mktemp("settings") / "sprint", '{"default_size": [64, 64]}')
