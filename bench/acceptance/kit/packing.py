"""Packs a folder with our code at a commit, the wheels that a host lacks, and run.sh."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from bench.acceptance.kit.contents import CODE, MOST_BYTES, UNTOUCHED, asked, pins
from bench.harness.errors import BenchError
from bench.harness.host import REVISION

CODE_FILE, WHEELS, ASKED, RUN = "code.tar.gz", "wheels", "requirements.txt", "run.sh"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "any")


def pack(root: Path, out: Path, pythons: Sequence[str]) -> int:
    """Replaces `out` by a kit of the commit that `root` is at. Returns its bytes.

    pythons: versions of the hosts' Python, as 3.12. Raises BenchError where git or pip fails, or the kit is too large.
    """
    revision = _told(["git", "rev-parse", "HEAD"], root).strip()
    made = out.with_name(f".{out.name}-unfinished")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _pack_code(root, made / CODE_FILE, revision)
    for python in pythons:
        _wheels(pins(root), made / WHEELS, python)
    taken = [path.name for path in (made / WHEELS).iterdir() if UNTOUCHED.match(path.name)]
    if taken:
        raise BenchError(f"{', '.join(taken)}: belongs to the host, and would have been packed")
    (made / ASKED).write_text("".join(f"{line}\n" for line in asked(root)))
    (made / REVISION).write_text(f"{revision}\n")
    shutil.copy(Path(__file__).parent / RUN, made / RUN)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    if size >= MOST_BYTES:
        raise BenchError(f"the kit has {size / 1e6:.1f} MB, allowed are less than {MOST_BYTES / 1e6:.0f}")
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    return size


def packed_code(root: Path) -> list[str]:
    """Returns the files of CODE that git tracks."""
    return _told(["git", "ls-files", *CODE], root).splitlines()


def _pack_code(root: Path, path: Path, revision: str) -> None:
    archived = subprocess.run(["git", "archive", revision, *CODE], cwd=root, capture_output=True, check=False)
    if archived.returncode:
        raise BenchError(f"git archive: {archived.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as source, tarfile.open(path, "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
        about = tarfile.TarInfo(REVISION)
        content = f"{revision}\n".encode()
        about.size = len(content)
        target.addfile(about, io.BytesIO(content))


def _wheels(wanted: Sequence[str], folder: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise BenchError(f"pip download for Python {python}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def _told(command: Sequence[str], root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}; a kit is packed from a git checkout")
    return done.stdout
