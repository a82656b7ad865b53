"""A narrow model runs on one thread where waiting threads sleep, and leaves the number to others as it was."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engines.device.threads import NARROW, choose_threads, compute_threads
from engines.loader import load_engine
from engines.models.transformer import SPRINT_0_6B
from engines.types import Job


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "threads"), [(NARROW - 1, 1), (NARROW, None), (SPRINT_0_6B.dim, None)])
def test_only_a_narrow_model_has_one(width: int, threads: int | None) -> None:
    reasons: dict[str, str] = {}
    assert choose_threads(width, reasons) == threads
    assert ("compute threads" in reasons) == (threads == 1)


def test_one_thread_needs_no_reason() -> None:
    torch.set_num_threads(1)
    reasons: dict[str, str] = {}
    assert choose_threads(64, reasons) is None
    assert not reasons


def test_an_error_leaves_the_number_too() -> None:
    with pytest.raises(KeyError), compute_threads(1):
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("sleep", "expected"), [(True, {1}), (False, {2})])
def test_tiny_computes_so(sleep: bool, expected: set[int]) -> None:
    engine = load_engine("tiny", device="cpu", threads_sleep=sleep)
    width, height = engine.limits.default_size
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        engine.generate([Job("a red circle", 1, width, height, 1)])
    finally:
        hook.remove()
    assert seen == expected
    assert torch.get_num_threads() == 2
