"""A native engine on a GPU: its start compiles nothing, and its images equal those without an engine."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton import knobs

from engines.build.builder import build
from engines.build.spec import BuildSpec
from engines.loader import load_engine
from engines.types import Job

pytestmark = pytest.mark.gpu


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the kernels that Triton compiled."""
    seen: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            seen.append(src.name)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    return seen


def test_it_starts_without_a_compiler_and_draws_the_same(tmp_path: Path, compiled: list[str]) -> None:
    out = tmp_path / "engine"
    build(BuildSpec("tiny", "native", "bf16", out, batches=(1, 2), vendor="native", jobs=os.cpu_count() or 1))
    built = load_engine("tiny", engine_dir=str(out), device="cuda", cache=str(tmp_path))
    built.warmup()
    assert compiled == []
    assert built.info.reasons["kernels"] == "all equal their references"
    direct = load_engine("tiny", device="cuda", max_batch=2)
    direct.warmup()
    width, height = direct.limits.default_size
    for steps in (1, 2):
        jobs = [Job(prompt, 3, width, height, steps) for prompt in ("a red circle", "three green triangles")]
        for one, other in zip(direct.generate(jobs), built.generate(jobs), strict=True):
            assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).mean() < 1
            assert not other.uncaptured
