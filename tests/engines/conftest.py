"""A small checkpoint for all engine tests, upstream's pipeline on it, and bf16 in Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import triton.language as tl
from small_checkpoint import save_checkpoint, with_settings
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

_create_dot = InterpreterBuilder.create_dot


def _dot_of_bf16(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """Converts bf16 to fp32: the interpreter multiplies its uint16 form as integers (Triton 3.7.1, create_dot)."""
    wide = [
        TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _create_dot(self, *wide, d, *rest)


InterpreterBuilder.create_dot = _dot_of_bf16


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a checkpoint that is read-only: a test that changes it copies it first."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sprint")


@pytest.fixture(scope="session")
def upstream(folder: Path) -> object:
    from diffusers import SanaSprintPipeline

    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def small_checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the same weights with a default size of 64x64."""
    return with_settings(folder, tmp_path_factory.mktemp("settings") / "sprint", '{"default_size": [64, 64]}')
