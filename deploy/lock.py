"""Pins what pyproject.toml asks for: requirements.lock to run, -dev to test and train, -deploy to test deploy/ too,
-cpu, -gpu, -rtx and -ray for the images of those flavours.

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
# Extra -> its pins. Its libraries lie on NVIDIA's own index, so that they are chosen by hand and resolved by nobody:
# the newest TensorRT 10 for CUDA 13, which is torch's; engines of one minor version are refused by another.
TENSORRT = "10.16.1.11"
BY_HAND = {"tensorrt": [f"tensorrt{part}=={TENSORRT}" for part in ("", "-cu13", "-cu13-bindings", "-cu13-libs")]}
# Lock -> extras. The first is what the others build on. `torch-tensorrt` stands in none: it wants its own TensorRT.
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
    resolved = [extra for extra in extras if extra not in BY_HAND]
    asked = project["dependencies"] + [line for extra in resolved for line in project["optional-dependencies"][extra]]
    chosen = [pin for extra in extras for pin in BY_HAND.get(extra, [])]
    kept = shared + [pin for pin in pins(lock) if pin.partition("==")[0] not in names(shared) | names(chosen)]
    found = [f"{name}=={version}" for name, version in resolve(asked, kept).items()]
    lines = [f"{pin}\n" for pin in sorted(found + chosen, key=lambda pin: pin.partition("==")[0])]
    lock.write_text(HEADER.format(what=", ".join(("dependencies", *extras))) + "".join(lines))
    print(f"{lock.name}: {len(lines)} pins")


def main() -> None:
    shared: list[str] = []
    for name, extras in LOCKS.items():
        write(ROOT / name, extras, shared)
        shared += [pin for pin in pins(ROOT / name) if pin.partition("==")[0] not in names(shared)]


if __name__ == "__main__":
    main()
