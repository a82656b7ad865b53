"""pyproject.toml requires every imported package, and the locks pin every requirement."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.lock import LOCKS

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = {lock: sum((EXTRAS[extra] for extra in extras), PROJECT["dependencies"]) for lock, extras in LOCKS.items()}

# The peers of `make peers`, each in its own environment.
PEERS = " ".join(re.findall(r"^(?:PEER_\w+|OPENVINO) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
# Distributions by import name, for packages that `make test` does not install.
DISTRIBUTION_NAMES = {"helm_python": "helm-python-sdk", "open_clip": "open-clip-torch", "clip": "openai-clip"}


def pins(lock: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(len(requirement.specifier) == 1 and not requirement.url for requirement in requirements)
    return {r.name: Version(next(iter(r.specifier)).version) for r in requirements}


@pytest.mark.parametrize("lock", REQUIRED)
def test_lock_pins_every_requirement(lock: str) -> None:
    pinned = pins(lock)
    for requirement in map(Requirement, REQUIRED[lock]):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in {lock}: run `make lock`"
        assert pinned[name] in requirement.specifier, f"{lock} pins {name} {pinned[name]}: run `make lock`"


@pytest.mark.parametrize("lock", REQUIRED)
def test_no_pin_belongs_to_one_machine(lock: str) -> None:
    assert [name for name, version in pins(lock).items() if version.local] == []


@pytest.mark.parametrize("lock", REQUIRED)
def test_every_lock_holds_the_server_s_pins(lock: str) -> None:
    server, other = pins("requirements.lock"), pins(lock)
    assert {name: other.get(name) for name in server} == server


@pytest.mark.parametrize("lock", ["requirements-gpu.lock", "requirements-ray.lock"])
def test_tensorrt_of_server_cards_is_one_version_for_cuda_13(lock: str) -> None:
    versions = {name: str(version) for name, version in pins(lock).items() if name.startswith("tensorrt")}
    assert set(versions) == {"tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs"}
    (version,) = set(versions.values())
    assert Version("10.13") <= Version(version) < Version("11")  # 11 has another interface and engine format


def test_flavours_of_the_gpu_differ_in_tensorrt_alone() -> None:
    server, geforce = pins("requirements-gpu.lock"), pins("requirements-rtx.lock")
    assert {name for name in server.keys() ^ geforce.keys() if not name.startswith("tensorrt")} == set()
    assert {name: version for name, version in server.items() if name in geforce} == {
        name: version for name, version in geforce.items() if name in server
    }


def imported_packages(folder: str) -> Iterator[str]:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", ["server", "engines", "distill", "bench", "tests"])
def test_every_imported_package_is_required(folder: str) -> None:
    required = {
        canonicalize_name(Requirement(line).name)
        for lines in [*REQUIRED.values(), *EXTRAS.values(), PEERS]
        for line in lines
    }
    programs = [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    ours = {"server", "engines", "distill", "bench", "deploy", "sana_sprint_client", *(path.stem for path in programs)}
    distributions = packages_distributions()
    for package in sorted(set(imported_packages(folder)) - ours - sys.stdlib_module_names):
        providers = {
            canonicalize_name(name) for name in distributions.get(package, [DISTRIBUTION_NAMES.get(package, package)])
        }
        assert providers & required, f"{folder} imports {package}: add it to pyproject.toml and run `make lock`"


@pytest.mark.parametrize("package", DISTRIBUTION_NAMES)
def test_distribution_names_are_those_installed(package: str) -> None:
    installed = packages_distributions().get(package)
    assert installed in (None, [DISTRIBUTION_NAMES[package]])


def test_an_installation_holds_every_package_and_program() -> None:
    built = PYPROJECT["tool"]["setuptools"]
    rooms = ("server", "engines", "distill", "bench")
    files = [path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert {".".join(path.parent.parts) for path in files} == set(built["packages"]) - {"engines.tiny"}
    data = [
        ROOT / package.replace(".", "/") / name for package, names in built["package-data"].items() for name in names
    ]
    assert [str(path) for path in data if "*" not in path.name and not path.is_file()] == []
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(built.get("py-modules", []))
