"""How a program that measures ends: a table for people, one JSON document as the last line, and an exit code."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from engines.errors import SprintError

F = TypeVar("F", bound=Mapping[str, Any])

CANNOT = 3  # the exit code of a measurement that cannot be made


def told(measure: Callable[[], F], show: Callable[[F], str], failed: Callable[[F], object] = lambda _: False) -> int:
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
