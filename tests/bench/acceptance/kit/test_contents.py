"""A kit holds the code at the commit, and every package that this code imports and a host may lack."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

from bench.acceptance.kit.contents import HOST, NOT_PACKED, UNTOUCHED, asked, pins
from bench.acceptance.kit.packing import packed_code

ROOT = Path(__file__).resolve().parents[4]
STEPS = ("running", "kernels", "controlnet", "threads", "precisions", "alternatives", "dependent_launch")
STARTED = (
    *("server.__main__", "build_engine", "bench.acceptance.__main__", "bench.acceptance.over_http.__main__"),
    *("engines.artifacts.native.compiling", *(f"bench.acceptance.kit.{step}" for step in STEPS)),
)
WHEELS = (
    "annotated-doc annotated-types anyio certifi charset-normalizer click diffusers fastapi filelock fpng fsspec "
    "h11 hf-xet httpcore httpcore2 httptools httpx httpx2 huggingface-hub idna importlib-metadata lazy-importer "
    "lazy-loader markdown-it-py mdurl opentelemetry-api packaging pillow prometheus-client pybase64 pydantic "
    "pydantic-core pygments python-multipart pyyaml regex requests rich safetensors shellingham starlette "
    "tokenizers tqdm transformers truststore typer typing-extensions typing-inspection urllib3 uvicorn websockets "
    "zipp"
)


def packed() -> set[str]:
    return {pin.partition("==")[0] for pin in pins(ROOT)}


def distribution(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_list_of_wheels() -> None:
    assert " ".join(sorted(packed())) == WHEELS
    assert not [name for name in packed() if UNTOUCHED.match(name)]
    assert not packed() & HOST


def test_the_list_of_code() -> None:
    files = packed_code(ROOT)
    assert {file.split("/")[0] for file in files} == {
        "server", "engines", "distill", "bench", "models", "build_engine.py", "pyproject.toml",
    }  # fmt: skip
    assert {"bench/acceptance/kit/run.sh", "models/tiny/tokenizer/tokenizer.json"} <= set(files)
    assert not [file for file in files if file.startswith("bench/results")]
    assert {path for path, _ in reached().values()} <= {ROOT / file for file in files}


def test_what_is_installed_is_what_the_server_depends_on() -> None:
    wanted = {distribution(Requirement(line).name) for line in asked(ROOT)}
    assert {"fastapi", "tokenizers", "transformers"} <= wanted <= packed()
    assert "torch" not in wanted


def test_every_package_that_a_wheel_wants_is_there() -> None:
    """Checks the requirements of installed packages for Linux, without extras."""
    for name in packed():
        for line in requires(name) or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": "", "python_version": "3.12"}):
                assert distribution(wanted.name) in packed() | HOST, f"{name} wants {wanted}"


def test_every_import_is_met() -> None:
    """Wheels and the host provide each import; only functions may import a package of NOT_PACKED."""
    providers = packages_distributions()
    met, unmet = packed() | HOST, set()
    for module, (_, imports) in reached().items():
        for name, inside in imports:
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or (ROOT / top).is_dir() or top == "build_engine":
                continue
            found = {distribution(provider) for provider in providers.get(top, ())}
            if not found & met and not (inside and top in NOT_PACKED):
                unmet.add((module, name))
    assert not unmet


def reached() -> dict[str, tuple[Path, list[tuple[str, bool]]]]:
    """Returns our modules that a step may load: each with its file, its imports, and whether a function holds them."""
    found: dict[str, tuple[Path, list[tuple[str, bool]]]] = {}
    waiting = list(STARTED)
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if path is None or module in found:
            continue
        found[module] = path, list(imports_of(ast.parse(path.read_text()), inside=False))
        waiting += [name for name, _ in found[module][1]]
        waiting += [module.rpartition(".")[0]] if "." in module else []
    return found


def file_of(module: str) -> Path | None:
    stem = ROOT.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def imports_of(node: ast.AST, *, inside: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name their module in full"
            yield child.module or "", inside
            yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
        yield from imports_of(child, inside=inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
