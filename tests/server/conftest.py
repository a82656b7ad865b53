"""Servers for the tests: one for each test that asks, or one for a whole module that leaves nothing behind."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from running_server import GatedEngine, Running, Serve, start

from engines.fake import FakeEngine


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(engine, ready=True, **settings) starts a server; all are stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda engine=None, **options: start(stack, engine or FakeEngine(), **options)


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """One server for the tests of a module that leave nothing behind."""
    with ExitStack() as stack:
        yield start(stack, FakeEngine())


@pytest.fixture
def gated() -> GatedEngine:
    return GatedEngine()
