"""The request of a build, with defaults from the checkpoint, its command line and its fingerprint."""

import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
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
    """The request of a build. sizes empty: those of the checkpoint."""

    model: str
    gpu: str
    precision: str
    out: Path
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = (1, 2, 4, 8)
    steps: tuple[int, ...] = (1, 2, 4)
    decoder: str | None = None
    fast_decoder: str | None = None  # a second one, of which jobs may ask
    vendor: str | None = None  # one of engines.build.targets.VENDORS; None: decided by the installed packages
    jobs: int = 1  # processes that compile kernels
    lora: tuple[AdapterOption, ...] = ()  # fused; scale None means 1
    quality: bool = False  # compare images after the build (engines.build.paired_check)

    @property
    def command(self) -> str:
        """Returns the shell command that builds it again."""
        parts = ["python", "build_engine.py", "--model", self.model, "--gpu", self.gpu, "--precision", self.precision]
        parts += ["--out", str(self.out), "--sizes", ",".join(f"{width}x{height}" for width, height in self.sizes)]
        parts += ["--batches", ",".join(map(str, self.batches)), "--steps", ",".join(map(str, self.steps))]
        parts += ["--vendor", self.vendor] if self.vendor else []
        parts += ["--decoder", self.decoder] if self.decoder else []
        parts += ["--fast-decoder", self.fast_decoder] if self.fast_decoder else []
        return shlex.join(parts + [word for option in self.lora for word in ("--lora", str(option))])


def size_label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def with_checkpoint_defaults(spec: BuildSpec, checkpoint: Checkpoint) -> BuildSpec:
    """Returns `spec` with the checkpoint's sizes if it has none, and all lists ascending. Raises BuildError."""
    sizes = spec.sizes or checkpoint.settings.sizes or (checkpoint.settings.default_size,)
    unit = math.lcm(32, checkpoint.autoencoder.compression)
    for size in sizes:
        if any(side <= 0 or side % unit for side in size):
            raise BuildError(f"sizes: got {size_label(size)}, both sides must be multiples of {unit}")
    for name, values, largest in (("batches", spec.batches, 64), ("steps", spec.steps, 4)):
        if not values or not all(1 <= value <= largest for value in values):
            raise BuildError(f"{name}: got {','.join(map(str, values)) or 'none'}, allowed 1 to {largest}")
    batches, steps = tuple(sorted(set(spec.batches))), tuple(sorted(set(spec.steps)))
    lora = tuple(option._replace(scale=1.0) if option.scale is None else option for option in spec.lora)
    return replace(spec, sizes=tuple(sorted(set(sizes))), batches=batches, steps=steps, lora=lora)


def fingerprint_of(spec: BuildSpec, target: Target, weights: Sequence[str | None], versions: Mapping[str, str]) -> str:
    """Returns the hash of all inputs of a build: request, digests of weights, packages and this code."""
    request = replace(spec, out=Path(), jobs=1, quality=False)
    digest = hashlib.sha256(repr((request, target, tuple(weights), sorted(versions.items()))).encode())
    for path in sources(ENGINES):
        digest.update(f"{path.relative_to(ENGINES)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def sources(engines: Path) -> list[Path]:
    """Returns every source below the folder of the engines; a change of any of them causes a new build."""
    return sorted(path for path in engines.rglob("*") if path.suffix in _SOURCES and path.is_file())
