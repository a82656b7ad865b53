"""The C library for every set of instructions that this CPU has."""

import pytest
from c_libraries import compiled_library

from engines.backends.cpu.c_library import Library, instruction_sets


@pytest.fixture(params=instruction_sets())
def library(request: pytest.FixtureRequest) -> Library:
    return compiled_library(request.param)
