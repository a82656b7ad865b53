"""Pins what pyproject.toml asks for: requirements.lock to run, -dev to test and train, -deploy to test deploy/ too,
-cpu and -gpu for the images of those flavours, -ray for the image of a Ray cluster.

pip's own resolver decides, in a dry run that installs nothing. Versions that stand in the present locks are kept, so a
new dependency changes only the lines it brings; delete a line, or a whole lock, to have newer versions chosen. Run as
`make lock`. Knows nothing of the packages' contents. Why there are no hashes: docs/understand/decisions/0002-lock.md.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"  # the newest release whose CPU wheel is at hand where this is tested
TRITON = "triton==3.7.1"  # what that torch's wheel for CUDA asks for, which the CPU's does not say
# Lock -> extras. The first is what the others build on. `tensorrt` and `torch-tensorrt` stand in none: their libraries
# lie on NVIDIA's own index, and their versions follow the card's driver.
TEST = ("test", "train", "openvino", "build", "tensorrt-rtx", "otel")
LOCKS: dict[str, tuple[str, ...]] = {
    "requirements.lock": (),
    "requirements-dev.lock": TEST,
    "requirements-deploy.lock": (*TEST, "deploy"),
    "requirements-cpu.lock": ("openvino", "export"),
    "requirements-gpu.lock": ("gpu",),
    "requirements-ray.lock": ("gpu", "ray"),
}
HEADER = "# Written by `make lock` from pyproject.toml ({what}). Do not edit, except to delete lines.\n"


def resolve(requirements: list[str], kept: list[str]) -> dict[str, str]:
    """Distribution name -> version of everything that `requirements` need, with the pins of `kept` respected.

    Local versions (2.13.0+cpu) are cut to the public one, so that each machine takes the wheel it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join([TORCH, TRITON, *kept]) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraints), *requirements]
        subprocess.run(command, check=True)
        metadata = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {canonical(entry["name"]): entry["version"].partition("+")[0] for entry in metadata}


def canonical(name: str) -> str:
    """The normal form of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> list[str]:
    """The lines `name==version` of a lock; none where there is no such file."""
    if not lock.exists():
        return []
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def names(lines: list[str]) -> set[str]:
    return {pin.partition("==")[0] for pin in lines}


def write(lock: Path, extras: tuple[str, ...], shared: list[str]) -> None:
    """Writes a lock of the dependencies and `extras`, with the pins in `shared` and in the present lock kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    kept = shared + [pin for pin in pins(lock) if pin.partition("==")[0] not in names(shared)]
    lines = [f"{name}=={version}\n" for name, version in sorted(resolve(asked, kept).items())]
    lock.write_text(HEADER.format(what=", ".join(("dependencies", *extras))) + "".join(lines))
    print(f"{lock.name}: {len(lines)} pins")


def main() -> None:
    shared: list[str] = []
    for name, extras in LOCKS.items():
        write(ROOT / name, extras, shared)
        shared += [pin for pin in pins(ROOT / name) if pin.partition("==")[0] not in names(shared)]


if __name__ == "__main__":
    main()
