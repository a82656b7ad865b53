"""A folder that appears complete or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from engines.artifacts.manifest import MANIFEST_FILE
from engines.errors import BuildError, DiskFullError

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota used up", errno.EFBIG: "file size limit reached"}


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` at the end of the block, and that an error removes.

    Removes the leftovers of killed builds first. Raises BuildError if `out` is no folder of engines, DiskFullError
    without room.
    """
    out = out.absolute()
    if out.exists() and not (out / MANIFEST_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"out: {out} exists and is no folder of engines; name another, or remove it")
    folder = out.with_name(f".{out.name}.building-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder.mkdir()
        yield folder
        _publish(folder, out)
    except Exception as error:
        if (reason := _FULL.get(_errno(error))) is not None:
            free = shutil.disk_usage(out.parent).free / 1e9
            raise DiskFullError(
                f"out: {reason} while writing {out} ({free:.1f} GB free there); nothing was left behind"
            ) from error
        if isinstance(error, OSError):
            raise BuildError(f"out: cannot write {out}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _errno(error: Exception) -> int:
    """Returns the error number of the system, also from the text of an error of safetensors; 0 for other errors."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else 0


def _publish(folder: Path, out: Path) -> None:
    """Replaces `out` by `folder`. Between the two renames `out` is absent, never partial."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not out.exists():
        folder.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.rename(old)
    folder.rename(out)
    shutil.rmtree(old)


def _remove_abandoned(out: Path) -> None:
    """Removes the folders of builds whose process has ended; restores replaced engines if `out` is missing."""
    for path in sorted(out.parent.glob(f".{escape(out.name)}.*-*")):
        kind, _, process = path.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("building", "replaced") or not process.isdecimal() or _alive(int(process)):
            continue
        if kind == "replaced" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
