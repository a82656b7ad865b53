"""The import table of ARCHITECTURE.md, held against the syntax trees of the code; no cycle between rooms or files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("server", "engines", "distill", "bench")
NO_ENGINE = {"asyncio", "http", "socket", "socketserver"}  # what engines leave to the server, standard library or not


class Row(NamedTuple):
    rooms: list[str]
    top: list[str]
    inside: list[str]


class Import(NamedTuple):
    target: str  # dotted, as deep as it names a module or a name in one
    line: int
    inside: bool  # a function's body


def table() -> list[Row]:
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## Who may import whom", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [Row(*(re.findall(r"`([\w.]+)`", cell) for cell in row)) for row in rows]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the four houses."""
    found = {}
    for house in HOUSES:
        for path in sorted((ROOT / house).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def module_of(target: str) -> str | None:
    """The module of ours that an import of `target` loads: itself, or what it is a name in."""
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target or None


def is_package(module: str) -> bool:
    return module in MODULES and MODULES[module].name == "__init__.py"


def room_of(module: str) -> str:
    """Its folder or, beside the rooms of a house, the file itself."""
    return module if is_package(module) or module.count(".") < 2 else module.rpartition(".")[0]


def row_of(module: str) -> Row:
    rows = {room: row for row in table() for room in row.rooms}
    row = rows.get(module) or rows.get(room_of(module))
    assert row, f"no row of ARCHITECTURE.md's import table names {module} or its room"
    return row


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; write the name of the package"
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, inside) for alias in node.names)
        else:
            deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, inside=deeper)


def granted(module: str, target: str, grants: list[str]) -> bool:
    package = target.partition(".")[0]
    if package not in HOUSES:
        return package in grants
    loaded = module_of(target)
    assert loaded, f"{module} imports {target}, which is not there"
    return bool({package, target, loaded, room_of(loaded)} & {*grants, room_of(module)})


def trespasses(module: str, source: str) -> list[str]:
    """Returns the imports of `source`, as the text of `module`, that the table does not grant."""
    row = row_of(module)
    found = []
    for target, line, inside in imports(ast.parse(source)):
        package = target.partition(".")[0]
        if package in sys.stdlib_module_names and not (module.startswith("engines.") and package in NO_ENGINE):
            continue
        if not granted(module, target, [*row.top, *(row.inside if inside else [])]):
            found.append(f"{module} line {line}: {target}")
    return found


def test_import_table_is_kept() -> None:
    files = {module: path for module, path in MODULES.items() if not is_package(module)}
    assert [hit for module, path in files.items() for hit in trespasses(module, path.read_text())] == []


def test_packages_hold_nothing_to_import() -> None:
    """But for the version of the server: a package is a docstring, so that importing a room imports no other."""
    for module, path in MODULES.items():
        if is_package(module):
            body = ast.parse(path.read_text()).body
            names = [node.targets[0].id for node in body if isinstance(node, ast.Assign)]  # type: ignore[attr-defined]
            assert isinstance(body[0], ast.Expr), module
            assert len(body) == 1 + len(names), module
            assert names == (["__version__"] if module == "server" else []), module


def test_import_table_names_only_rooms_that_exist() -> None:
    present = set(MODULES) | {"server.__version__"}
    named = {name for row in table() for name in row.rooms}
    grants = {name for row in table() for name in [*row.top, *row.inside] if name.partition(".")[0] in HOUSES}
    assert (named | grants) - present == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.app", "import torch"),
        ("server.app", "from engines import sampler"),
        ("server.app", "def start() -> None:\n    from torch import nn"),
        ("server.generation.scheduler", "from fastapi import FastAPI"),
        ("server.generation.scheduler", "from server.http.state import RequestContext"),
        ("server.http.middleware", "from server.http.routes.page import STATIC"),
        ("engines.types", "from engines.models.dcae import Decoder"),
        ("engines.sampler", "import asyncio"),
        ("engines.sampler", "import numpy"),
        ("engines.models.dcae", "import fastapi"),
        ("engines.loader", "from engines.build.builder import build"),
        ("distill.train", "import server.app"),
    ],
)
def test_trespasses_are_seen(module: str, source: str) -> None:
    assert len(trespasses(module, source)) == 1


def arrows() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, at the top or inside functions."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        targets = {module_of(target) for target, _, _ in imports(ast.parse(path.read_text()))}
        found[module] = {target for target in targets if target and target != module and not is_package(target)}
    return found


def between_rooms(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for module, targets in files.items():
        rooms.setdefault(room_of(module), set()).update({room_of(target) for target in targets} - {room_of(module)})
    return rooms


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_two_rooms_and_no_two_files_import_each_other() -> None:
    files = arrows()
    assert len(files) > 150
    assert cycle(files) == []
    assert cycle(between_rooms(files)) == []
    files["server.http.state"].add("server.live.sessions")
    assert {"server.http", "server.live"} <= set(cycle(between_rooms(files)))


def test_engines_read_no_environment() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)\b|from os import .*\b(environ|getenv)\b")
    engines = {name: path for name, path in MODULES.items() if name.partition(".")[0] == "engines"}
    assert [name for name, path in engines.items() if reads.search(path.read_text())] == []


@pytest.mark.parametrize("module", ["engines.fake", "server.app", "server.__main__"])
def test_the_server_leaves_torch_out(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_no_file_outgrows_its_room() -> None:
    long = {str(path): count for path in MODULES.values() if (count := len(path.read_text().splitlines())) > 350}
    assert long == {}
