"""run_in_subprocess: the call returns, dies or hangs, and its caller goes on."""

import operator
import os
import time

import pytest

from bench.harness.errors import BenchError
from bench.harness.subprocess_call import run_in_subprocess


def test_the_answer_comes_back() -> None:
    assert run_in_subprocess(60, operator.add, 1, 2) == 3
    assert run_in_subprocess(60, os.getpid) != os.getpid()


def test_raises_what_the_call_raises() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        run_in_subprocess(60, int, "seven")


def test_a_process_that_dies_is_told_by_what_ended_it() -> None:
    with pytest.raises(BenchError, match=r"^its process died: SIGABRT$"):
        run_in_subprocess(60, os.abort)
    with pytest.raises(BenchError, match=r"^its process died: exit 3$"):
        run_in_subprocess(60, os._exit, 3)


def test_one_that_hangs_is_ended() -> None:
    with pytest.raises(BenchError, match=r"^not done after 0\.1 s; its process was ended$"):
        run_in_subprocess(0.1, time.sleep, 600)
