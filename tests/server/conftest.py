"""Fixtures that start servers: per test, or per module for tests that leave no state behind."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from running_server import GatedEngine, Running, Serve, start

from engines.fake import FakeEngine


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


@pytest.fixture
def gated() -> GatedEngine:
    return GatedEngine()
