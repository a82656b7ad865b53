"""How a program that measures is called, and how it ends: a table, one line of JSON, an exit code."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from engines.errors import SprintError


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from N or WxH, for argparse."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed is N or WxH, such as 512 or 640x384")
    return int(found.group(1)), int(found.group(2) or found.group(1))


def comma_separated(text: str) -> tuple[str, ...]:
    """Of `a,b`; empty of an empty text."""
    return tuple(word for word in text.split(",") if word)


def command(program: str, argv: Sequence[str]) -> str:
    """The line to type for the same measurement."""
    return f"python -m {program} {shlex.join(argv)}".strip()


F = TypeVar("F", bound=Mapping[str, Any])

CANNOT = 3  # the exit code of a measurement that cannot be made


def run_benchmark(
    measure: Callable[[], F], show: Callable[[F], str], failed: Callable[[F], object] = lambda _: False
) -> int:
    """Measures, prints, and returns the exit code: 1 where what was found has `failed`, else 0.

    A SprintError becomes one line on stderr and CANNOT.
    """
    try:
        found = measure()
    except SprintError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT
    print(show(found))
    print(json.dumps(found))
    return int(bool(failed(found)))
