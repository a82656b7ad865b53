"""A folder that appears whole or not at all."""

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
    """An empty folder beside `out`, which becomes `out` when the block ends and is removed when it fails.

    What killed builds left beside `out` is removed first. Raises BuildError where `out` is something else than a folder
    of engines, DiskFullError where there is no room.
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
        if (reason := _FULL.get(_number(error))) is not None:
            free = shutil.disk_usage(out.parent).free / 1e9
            raise DiskFullError(
                f"out: {reason} while writing {out} ({free:.1f} GB free there); nothing was left behind"
            ) from error
        if isinstance(error, OSError):
            raise BuildError(f"out: cannot write {out}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _number(error: Exception) -> int:
    """What the system said, also where it is told in words, as safetensors does; 0 where it was not the system."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def _publish(folder: Path, out: Path) -> None:
    """Puts `folder` in the place of `out`. Between the two renames there is no `out`, never half a one."""
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
    """Removes the folders of builds whose process is gone; of a replaced one, puts the engines back if `out` is not."""
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
