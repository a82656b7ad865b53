"""The engine tests' small checkpoint, for measurements that need one."""

from pathlib import Path

import pytest
from small_checkpoint import save_checkpoint, with_settings


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for 64x64, in diffusers' layout."""
    saved = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sprint")
    return with_settings(saved, tmp_path_factory.mktemp("settings") / "sprint", '{"default_size": [64, 64]}')
