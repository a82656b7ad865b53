"""Expands ~ in paths. The user of a container may have no home directory, so only paths with ~ need one."""

from pathlib import Path

from engines.errors import SprintError


def expand_home(path: Path, error: type[SprintError], remedy: str) -> Path:
    """Returns `path` with ~ expanded. Raises `error` with the remedy if the user has no home directory."""
    try:
        return path.expanduser()
    except RuntimeError as cause:
        raise error(f"{path}: this user has no home directory; {remedy}") from cause
