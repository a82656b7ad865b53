"""A folder that appears complete or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from engines.artifacts.manifest import MANIFEST_FILE
from engines.build.atomic_directory import atomic_directory
from engines.errors import BuildError, DiskFullError


def engines(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(content)
    return folder


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "engines"
    with atomic_directory(out) as folder:
        (folder / "cache").mkdir()
        (folder / MANIFEST_FILE).write_text("new")
        assert not out.exists()
    assert (out / MANIFEST_FILE).read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["engines"]


def test_takes_the_place_of_old_engines(tmp_path: Path) -> None:
    out = engines(tmp_path / "engines", "old")
    (out / "left_over").touch()
    with atomic_directory(out) as folder:
        (folder / MANIFEST_FILE).write_text("new")
    assert [path.name for path in out.iterdir()] == [MANIFEST_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_failure_leaves_the_old_engines_and_nothing_else(tmp_path: Path) -> None:
    out = engines(tmp_path / "engines", "old")
    with pytest.raises(KeyError), atomic_directory(out) as folder:
        raise KeyError((folder / MANIFEST_FILE).write_text("new"))
    assert (out / MANIFEST_FILE).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota used up"), (errno.EIO, "cannot write")]
)
def test_what_the_disk_says_is_a_build_error(number: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=words), atomic_directory(tmp_path / "engines"):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_known_by_the_words_of_safetensors_too(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="no space left"), atomic_directory(tmp_path / "engines"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_what_is_no_folder_of_engines_is_not_touched(content: str, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").touch()
    with (
        pytest.raises(BuildError, match=r"precious exists and is no folder of engines; name another"),
        atomic_directory(out),
    ):
        pass
    assert out.exists()


def test_leavings_of_dead_builds_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    dead, living = tmp_path / f".engines.building-{dead_process()}", tmp_path / f".engines.building-{os.getppid()}"
    other = tmp_path / f".others.building-{dead_process()}"
    for folder in (dead, living, other):
        folder.mkdir()
    with atomic_directory(tmp_path / "engines"):
        assert not dead.exists()
    assert living.exists()
    assert other.exists()


def test_a_build_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    engines(tmp_path / f".engines.replaced-{dead_process()}", "old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "engines"):
        raise KeyError
    assert (tmp_path / "engines" / MANIFEST_FILE).read_text() == "old"
