"""The home directory of the user, asked for only where it is needed: a container's user may have none."""

from pathlib import Path

from engines.errors import SprintError


def expand_home(path: Path, error: type[SprintError], remedy: str) -> Path:
    """`path` with its ~ resolved. Raises `error`, with what to do, where the user has no home directory."""
    try:
        return path.expanduser()
    except RuntimeError as cause:
        raise error(f"{path}: this user has no home directory; {remedy}") from cause
