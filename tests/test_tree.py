"""The tree of ARCHITECTURE.md matches the file system and the rooms' purposes, and no folder is too full."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("server", "engines", "distill", "bench")
MAX_ENTRIES = 14  # of a folder
DATA = ("server/static", "bench/results")  # not limited


class Entry(NamedTuple):
    path: str
    is_folder: bool
    purpose: str


def tree() -> list[Entry]:
    block = (ROOT / "ARCHITECTURE.md").read_text().split("```\n", 2)[1]
    result: list[Entry] = []
    folders: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)([\w.]+)(/?) +(\S.*)", line)
        assert match, f"not an entry of the tree: {line!r}"
        depth = len(match[1]) // 2
        folders = [*folders[:depth], match[2]]
        result.append(Entry("/".join(folders), match[3] == "/", match[4]))
    return result


def purpose_of(package: Path) -> str:
    return (ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "").strip()


def rooms() -> Iterator[Path]:
    for house in HOUSES:
        yield from (path.parent for path in sorted((ROOT / house).rglob("__init__.py")))


def entries(folder: Path) -> list[str]:
    hidden = (".", "__pycache__")
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(hidden))


def test_every_entry_of_the_tree_exists() -> None:
    listed = tree()
    assert len(listed) > 50
    assert [entry.path for entry in listed if (ROOT / entry.path).is_dir() != entry.is_folder] == []
    assert [entry.path for entry in listed if not (ROOT / entry.path).exists()] == []


def test_every_room_is_in_the_tree_with_its_purpose() -> None:
    purposes = {entry.path: entry.purpose for entry in tree() if entry.is_folder}
    for room in rooms():
        name = str(room.relative_to(ROOT))
        assert purposes.get(name) == purpose_of(room), f"{name}: the tree and the docstring of its __init__ differ"


@pytest.mark.parametrize("house", HOUSES)
def test_every_file_beside_the_rooms_of_a_house_is_in_the_tree(house: str) -> None:
    listed = {entry.path for entry in tree()}
    files = [path for path in (ROOT / house).glob("*.py") if path.name != "__init__.py"]
    assert {str(path.relative_to(ROOT)) for path in files} - listed == set()


@pytest.mark.parametrize("house", [*HOUSES, "tests"])
def test_no_folder_is_too_full(house: str) -> None:
    folders = [ROOT / house, *(path for path in (ROOT / house).rglob("*") if path.is_dir())]
    for folder in folders:
        name = str(folder.relative_to(ROOT))
        if name not in DATA and "__pycache__" not in name:
            names = entries(folder)
            assert len(names) <= MAX_ENTRIES, (
                f"{name}: got {len(names)} entries, at most {MAX_ENTRIES}: {', '.join(names)}"
            )
