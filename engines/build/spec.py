"""What a build is asked for: completed from the checkpoint, as a command line, and as a fingerprint."""

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engines.build.targets import Target
from engines.checkpoints.checkpoint import Checkpoint
from engines.errors import BuildError
from engines.types import AdapterOption

Size = tuple[int, int]  # width, height in pixels
ENGINES = Path(__file__).resolve().parents[1]
_SOURCES = (".py", ".cu", ".cuh", ".cpp", ".c", ".h")


@dataclass(frozen=True)
class BuildSpec:
    """What build_engine.py is asked for. sizes empty: the checkpoint's own."""

    model: str
    gpu: str
    precision: str
    out: Path
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = (1, 2, 4, 8)
    steps: tuple[int, ...] = (1, 2, 4)
    decoder: str | None = None
    vendor: str | None = None  # one of engines.build.targets.VENDORS; None: what is installed decides
    jobs: int = 1  # processes that compile kernels
    lora: tuple[AdapterOption, ...] = ()  # fused; without a scale at 1

    @property
    def command(self) -> str:
        """The line that builds this again."""
        parts = ["python", "build_engine.py", "--model", self.model, "--gpu", self.gpu, "--precision", self.precision]
        parts += ["--out", str(self.out), "--sizes", ",".join(f"{width}x{height}" for width, height in self.sizes)]
        parts += ["--batches", ",".join(map(str, self.batches)), "--steps", ",".join(map(str, self.steps))]
        parts += ["--vendor", self.vendor] if self.vendor else []
        parts += ["--decoder", self.decoder] if self.decoder else []
        return shlex.join(parts + [word for one in self.lora for word in ("--lora", str(one))])


def size_label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def with_checkpoint_defaults(spec: BuildSpec, checkpoint: Checkpoint) -> BuildSpec:
    """`spec` with the checkpoint's sizes where it has none, and everything ascending. Raises BuildError."""
    sizes = spec.sizes or checkpoint.settings.sizes or (checkpoint.settings.default_size,)
    unit = math.lcm(32, checkpoint.autoencoder.compression)
    for size in sizes:
        if any(side <= 0 or side % unit for side in size):
            raise BuildError(f"sizes: got {size_label(size)}, both sides must be multiples of {unit}")
    for name, values, largest in (("batches", spec.batches, 64), ("steps", spec.steps, 4)):
        if not values or not all(1 <= value <= largest for value in values):
            raise BuildError(f"{name}: got {','.join(map(str, values)) or 'none'}, allowed 1 to {largest}")
    batches, steps = tuple(sorted(set(spec.batches))), tuple(sorted(set(spec.steps)))
    lora = tuple(one._replace(scale=1.0) if one.scale is None else one for one in spec.lora)
    return replace(spec, sizes=tuple(sorted(set(sizes))), batches=batches, steps=steps, lora=lora)


def fingerprint_of(spec: BuildSpec, target: Target, checkpoint_sha256: str, versions: Mapping[str, str]) -> str:
    """Of everything that decides what is built: the request, the weights, the packages and this code."""
    digest = hashlib.sha256(
        repr((replace(spec, out=Path(), jobs=1), target, checkpoint_sha256, sorted(versions.items()))).encode()
    )
    for path in sources(ENGINES):
        digest.update(f"{path.relative_to(ENGINES)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def sources(engines: Path) -> list[Path]:
    """Every source below the folder of the engines, so that a changed model, backend or kernel builds anew."""
    return sorted(path for path in engines.rglob("*") if path.suffix in _SOURCES and path.is_file())
