"""Fixtures that start servers, per test or per module for tests that leave no state behind, and a small checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from running_server import GatedEngine, Running, Serve, start

from engines.fake import FakeEngine
from engines.types import Engine


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Returns serve(engine, ready=True, **settings), which starts a server; the test's end stops all."""
    with ExitStack() as stack:
        yield lambda engine=None, **options: start(stack, engine or FakeEngine(), **options)


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """Starts one server for the tests of a module."""
    with ExitStack() as stack:
        yield start(stack, FakeEngine())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a small checkpoint of 64x64."""
    from small_checkpoint import save_checkpoint  # imports torch

    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sprint")
    (folder / "sprint.json").write_text('{"default_size": [64, 64]}')
    return folder


@pytest.fixture(scope="module")
def eager(model: Path) -> Engine:
    """Loads that checkpoint in PyTorch."""
    from engines.loader import load_engine  # imports torch

    return load_engine(str(model), backend="eager", device="cpu")


@pytest.fixture
def gated() -> GatedEngine:
    return GatedEngine()
