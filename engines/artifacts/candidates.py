"""Candidate engines for a checkpoint on this machine: per vendor, the requirements and the arguments of a build.

Chooses nothing and builds nothing; the server does (server/loading).
"""

import hashlib
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engines.artifacts.catalog import EngineRequirements
from engines.artifacts.vendors import VENDORS, Installed, Vendor
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_fast_decoder
from engines.checkpoints.fingerprint import decoder_sha256
from engines.checkpoints.lora import with_adapters
from engines.device.hardware import capability_text, package_versions, this_machine
from engines.types import AdapterOption, powers_of_two


@dataclass(frozen=True)
class Candidate:
    """An engine of one vendor. `missing`: packages and programs that a build needs and this machine lacks."""

    vendor: str
    name: str  # folder of a build
    requirements: EngineRequirements
    arguments: tuple[str, ...]  # of build_engine.py, without --out
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """Returns the shell command that builds it."""
        return shlex.join(["python", "build_engine.py", *self.arguments])


@dataclass(frozen=True)
class Candidates:
    """Candidates for one checkpoint in the order of VENDORS, all for the same `sizes` (width, height) and `batch`."""

    checkpoint: Checkpoint
    precision: str
    sizes: tuple[tuple[int, int], ...]
    batch: int
    each: tuple[Candidate, ...]
    why_none: str  # reason if `each` is empty


def has_gpu() -> bool:
    return this_machine().capability is not None


def candidates(
    model: str,
    *,
    device: str | None,
    backend: str,
    precision: str | None,
    sizes: Sequence[tuple[int, int]],
    max_batch: int,
    decoder: str | None,
    variant: str | None,
    fast_decoder: str | None = None,
    lora: Sequence[AdapterOption] = (),
    vendors: Sequence[Vendor] = VENDORS,
    installed: Installed = find_spec,
    which: Installed = shutil.which,
) -> Candidates:
    """Returns the candidates for `model`.

    device, backend, precision: as for engines.loader.load_engine. sizes empty: those of the checkpoint. Raises
    CheckpointError.
    """
    checkpoint = open_checkpoint(model, decoder, variant)
    fused, selectable = with_adapters(checkpoint, lora, {})
    machine = this_machine()
    kind = (device or ("cuda" if has_gpu() else "cpu")).partition(":")[0]
    capability = None if kind == "cpu" else machine.capability
    precision = precision or ("fp32" if kind == "cpu" else "bf16")
    served_sizes = tuple(sizes) or checkpoint.settings.sizes or (checkpoint.settings.default_size,)
    serving = [vendor for vendor in vendors if vendor.serves(kind, capability, precision)]
    serving = [vendor for vendor in serving if backend in ("auto", vendor.backend)]
    able = [vendor for vendor in serving if vendor.can_run(installed)]
    names = ", ".join(vendor.name for vendor in serving)
    why_none = f"none of {names} is installed" if serving else f"no vendor serves {precision} on {kind}"
    if variant is not None:
        able, why_none = [], "engines are built of the plain weights, and --variant asks for others"
    if selectable:
        able, why_none = [], f"built engines hold adapters fused, and {selectable[0].name} is by request"
    sha256 = fused.weights.sha256() if able else ""
    fast = open_fast_decoder(checkpoint, fast_decoder, variant) if able and fast_decoder else None
    second = None if fast is None else decoder_sha256(fast)
    each = []
    card = capability_text(capability) if capability else None
    for vendor in able:
        version = package_versions(vendor.name).get(vendor.name)
        requirements = EngineRequirements(
            sha256, vendor.name, version, card, precision, served_sizes, max_batch, second
        )
        arguments = ["--model", model, *vendor.arguments, "--precision", precision]
        arguments += ["--sizes", ",".join(f"{width}x{height}" for width, height in served_sizes)]
        arguments += ["--batches", ",".join(map(str, powers_of_two(max_batch)))]
        arguments += ["--decoder", decoder] if decoder else []
        arguments += ["--fast-decoder", fast_decoder] if fast_decoder else []
        arguments += [word for adapter in lora for word in ("--lora", str(adapter))]
        name, missing = _name(model, requirements), vendor.missing(installed, which)
        each.append(Candidate(vendor.name, name, requirements, tuple(arguments), missing))
    return Candidates(checkpoint, precision, served_sizes, max_batch, tuple(each), why_none)


def _name(model: str, requirements: EngineRequirements) -> str:
    """Returns the name of a folder: readable, and another one for other requirements."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name).strip("-.") or "model"
    digest = hashlib.sha256(repr(requirements).encode()).hexdigest()[:12]
    return f"{readable}-{requirements.vendor}-{requirements.precision}-{digest}"
