"""Pins the requirements of pyproject.toml: requirements.lock to run, -dev to test and train, -deploy to test deploy/
too, -cpu, -gpu, -rtx and -ray for the images of those flavours.

`make lock` runs it. pip's resolver decides in a dry run that installs nothing. It keeps the versions of the present
locks, so that a new dependency adds only its own lines; delete a line or a whole lock for newer versions. Kept instead
of pip-tools: see docs/understand/decisions/0002-lock.md, also for the missing hashes.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"  # the newest release with a CPU wheel in the test environment
TRITON = "triton==3.7.1"  # required by that torch's wheel for CUDA, but not by the one for CPUs
# Pins by extra, not resolved: TensorRT's libraries lie on NVIDIA's own index. It is the newest TensorRT 10 for torch's
# CUDA 13; one minor version refuses the engines of another.
TENSORRT = "10.16.1.11"
FIXED_PINS = {"tensorrt": [f"tensorrt{part}=={TENSORRT}" for part in ("", "-cu13", "-cu13-bindings", "-cu13-libs")]}
# Extras by lock; the others build on the first. No lock has `torch-tensorrt`, which needs its own TensorRT.
TEST = ("test", "train", "openvino", "build", "tensorrt-rtx", "otel")
LOCKS: dict[str, tuple[str, ...]] = {
    "requirements.lock": (),
    "requirements-dev.lock": TEST,
    "requirements-deploy.lock": (*TEST, "deploy"),
    "requirements-cpu.lock": ("openvino", "export"),
    "requirements-gpu.lock": ("gpu", "build", "tensorrt"),
    "requirements-rtx.lock": ("gpu", "build", "tensorrt-rtx"),
    "requirements-ray.lock": ("gpu", "build", "tensorrt", "ray"),
}
HEADER = "# Written by `make lock` from pyproject.toml ({what}). Do not edit, except to delete lines.\n"


def resolve(requirements: list[str], constraints: list[str]) -> dict[str, str]:
    """Returns the version of every distribution that `requirements` need, within `constraints`.

    It cuts local versions (2.13.0+cpu) to the public one, so that each machine takes the wheel it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraint_file, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraint_file.write_text("\n".join([TORCH, TRITON, *constraints]) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraint_file), *requirements]
        subprocess.run(command, check=True)
        metadata = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {canonical(entry["name"]): entry["version"].partition("+")[0] for entry in metadata}


def canonical(name: str) -> str:
    """Returns the normal form of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> list[str]:
    """Returns the lines `name==version` of a lock, or none if it does not exist."""
    if not lock.exists():
        return []
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def names(lines: list[str]) -> set[str]:
    return {pin.partition("==")[0] for pin in lines}


def write(lock: Path, extras: tuple[str, ...], shared: list[str]) -> None:
    """Writes a lock of the dependencies and `extras`; keeps the pins of `shared` and of the present lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    resolved = [extra for extra in extras if extra not in FIXED_PINS]
    requirements = project["dependencies"] + [
        line for extra in resolved for line in project["optional-dependencies"][extra]
    ]
    fixed = [pin for extra in extras for pin in FIXED_PINS.get(extra, [])]
    constraints = shared + [pin for pin in pins(lock) if pin.partition("==")[0] not in names(shared) | names(fixed)]
    resolved_pins = [f"{name}=={version}" for name, version in resolve(requirements, constraints).items()]
    lines = [f"{pin}\n" for pin in sorted(resolved_pins + fixed, key=lambda pin: pin.partition("==")[0])]
    lock.write_text(HEADER.format(what=", ".join(("dependencies", *extras))) + "".join(lines))
    print(f"{lock.name}: {len(lines)} pins")


def main() -> None:
    shared: list[str] = []
    for name, extras in LOCKS.items():
        write(ROOT / name, extras, shared)
        shared += [pin for pin in pins(ROOT / name) if pin.partition("==")[0] not in names(shared)]


if __name__ == "__main__":
    main()
