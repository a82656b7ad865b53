"""The command line of a benchmark: options, a table, one line of JSON, an exit code."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from engines.errors import SprintError

NOT_MEASURED = 3  # the exit code of a measurement that cannot be made

F = TypeVar("F", bound=Mapping[str, Any])
T = TypeVar("T")


class BenchmarkParser(argparse.ArgumentParser):
    """Parses the options of `python -m <program>`; `options.command` is the line that repeats the measurement."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._program = program

    def options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses `argv`, None: sys.argv."""
        arguments = sys.argv[1:] if argv is None else argv
        self.set_defaults(command=command(self._program, arguments))
        return self.parse_args(arguments)


def parse_size(text: str) -> tuple[int, int]:
    """Returns width and height from N or WxH, for argparse."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed is N or WxH, such as 512 or 640x384")
    return int(match.group(1)), int(match.group(2) or match.group(1))


def comma_separated(text: str) -> tuple[str, ...]:
    """Returns the words of `a,b`; none of an empty text."""
    return tuple(word for word in text.split(",") if word)


def comma_list(item: Callable[[str], T], allowed: Collection[T] | None = None) -> Callable[[str], tuple[T, ...]]:
    """Returns an argparse type of comma-separated items. It raises ArgumentTypeError for items that are not allowed."""

    def parse(text: str) -> tuple[T, ...]:
        items = tuple(map(item, comma_separated(text)))
        if allowed is not None and not set(items) <= set(allowed):
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {', '.join(map(str, allowed))}")
        return items

    return parse


def command(program: str, argv: Sequence[str]) -> str:
    """Returns the line to type for the same measurement."""
    return f"python -m {program} {shlex.join(argv)}".strip()


def run_benchmark(
    measure: Callable[[], F], show: Callable[[F], str], failed: Callable[[F], object] = lambda _: False
) -> int:
    """Measures and prints; returns 1 if the result has `failed`, else 0.

    A SprintError becomes one line on stderr and NOT_MEASURED.
    """
    try:
        result = measure()
    except SprintError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_MEASURED
    print(show(result))
    print(json.dumps(result))
    return int(bool(failed(result)))
