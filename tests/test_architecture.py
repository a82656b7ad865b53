"""The import table of ARCHITECTURE.md, held against the syntax trees of the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "engines", "distill", "bench")
NO_ENGINE = {"asyncio", "http", "socket", "socketserver"}  # what engines leave to the server, standard library or not


class Row(NamedTuple):
    modules: list[str]
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
    """Dotted name -> file of every module of the four rooms."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def row_of(module: str) -> Row:
    """The row that names `module` or, failing that, its nearest package."""
    named = [(len(name), row) for row in table() for name in row.modules if covers(name, module)]
    assert named, f"no row of ARCHITECTURE.md's import table covers {module}"
    return max(named, key=lambda pair: pair[0])[1]


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


def trespasses(module: str, source: str) -> list[str]:
    """What `source`, as the text of `module`, imports although the table does not grant it."""
    row = row_of(module)
    found = []
    for target, line, inside in imports(ast.parse(source)):
        package = target.partition(".")[0]
        granted = [*row.top, *(row.inside if inside else [])]
        free = package in sys.stdlib_module_names and not (covers("engines", module) and package in NO_ENGINE)
        if not free and not any(covers(allowed, target) for allowed in granted):
            found.append(f"{module} line {line}: {target}")
    return found


def test_import_table_is_kept() -> None:
    found = [hit for module, path in modules().items() for hit in trespasses(module, path.read_text())]
    assert found == []


def test_import_table_names_only_modules_that_exist() -> None:
    present = modules()
    named = {name for row in table() for name in row.modules}
    granted = {name for row in table() for name in [*row.top, *row.inside] if name.partition(".")[0] in ROOMS}
    assert (named | granted) - set(present) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.app", "import torch"),
        ("server.app", "from engines import sampler"),
        ("server.app", "def start() -> None:\n    from torch import nn"),
        ("engines.types", "from engines.models.dcae import Decoder"),
        ("engines.sampler", "import asyncio"),
        ("engines.sampler", "import numpy"),
        ("engines.models.dcae", "import fastapi"),
        ("distill.train", "import server.app"),
    ],
)
def test_trespasses_are_seen(module: str, source: str) -> None:
    assert len(trespasses(module, source)) == 1


def test_engines_read_no_environment() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)\b|from os import .*\b(environ|getenv)\b")
    found = [name for name, path in modules().items() if covers("engines", name) and reads.search(path.read_text())]
    assert found == []


@pytest.mark.parametrize("module", ["engines.fake", "server.app", "server.__main__"])
def test_the_server_leaves_torch_out(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_no_file_outgrows_its_room() -> None:
    long = {str(path): count for path in modules().values() if (count := len(path.read_text().splitlines())) > 350}
    assert long == {}
