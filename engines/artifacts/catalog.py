"""A folder with the folders of built engines: finds fitting ones, lists all, removes those of old versions."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.artifacts.manifest import FORMAT, MANIFEST_FILE, Manifest, read_manifest
from engines.device.hardware import package_versions
from engines.errors import ArtifactError


@dataclass(frozen=True)
class EngineRequirements:
    """Requirements that an engine must meet to serve here. Sizes are (width, height) in pixels."""

    checkpoint_sha256: str
    vendor: str
    version: str | None  # of the vendor's package
    capability: str | None  # of the card, such as 9.0; None on a CPU
    precision: str
    sizes: tuple[tuple[int, int], ...]
    batch: int  # the largest
    fast_decoder_sha256: str | None = None  # None: none is needed, and one does not matter

    def mismatch(self, manifest: Manifest) -> str | None:
        """Returns the first difference in words; None if the engine fits."""
        if manifest.checkpoint_sha256 != self.checkpoint_sha256:
            return f"of other weights ({manifest.checkpoint_sha256[:12]}, wanted {self.checkpoint_sha256[:12]})"
        if (manifest.vendor, manifest.compute_capability) != (self.vendor, self.capability):
            return f"for {manifest.vendor} on {manifest.device}"
        if (built := manifest.versions.get(self.vendor)) != self.version:
            return f"built by {self.vendor} {built or 'unknown'}, here is {self.version or 'none'}"
        if self.fast_decoder_sha256 not in (None, manifest.fast_decoder_sha256):
            held = manifest.fast_decoder and f"with the fast decoder {manifest.fast_decoder}"
            return held or "without a second decoder"
        if manifest.precision != self.precision:
            return f"in {manifest.precision}, wanted {self.precision}"
        if missing := set(self.sizes) - set(manifest.sizes):
            return "without " + ", ".join(f"{width}x{height}" for width, height in sorted(missing))
        if max(manifest.batches) < self.batch:
            return f"for batches of {max(manifest.batches)}, wanted {self.batch}"
        return None


@dataclass(frozen=True)
class CatalogEntry:
    """One folder of engines. `outdated`: reason why no process of this version can run it."""

    path: Path
    manifest: Manifest | None
    outdated: str | None
    bytes: int


def find_engine(
    folder: Path, requirements: EngineRequirements, without: Collection[Path] = ()
) -> tuple[Path | None, list[str]]:
    """Returns the first fitting engines in `folder` (but `without`), and one line for each that does not fit."""
    reasons: list[str] = []
    for path in _built(folder):
        try:
            why = "damaged" if path in without else requirements.mismatch(read_manifest(path))
        except ArtifactError as error:
            why = str(error)
        if why is None:
            return path, reasons
        reasons.append(f"{path.name}: {why}")
    return None, reasons


def list_engines(folder: Path) -> list[CatalogEntry]:
    """Returns every folder of engines in `folder`, by name."""
    entries = []
    for path in _built(folder):
        try:
            manifest = read_manifest(path)
            entries.append(CatalogEntry(path, manifest, _why_outdated(manifest), _size(path)))
        except ArtifactError as error:
            entries.append(CatalogEntry(path, None, f"not of format {FORMAT} ({error})", _size(path)))
    return entries


def prune(folder: Path) -> list[CatalogEntry]:
    """Removes the engines of old versions and returns them. Engines of a vendor that is not installed stay."""
    removed = [entry for entry in list_engines(folder) if entry.outdated is not None]
    for entry in removed:
        shutil.rmtree(entry.path)
    return removed


def _why_outdated(manifest: Manifest) -> str | None:
    here: Mapping[str, str] = package_versions(manifest.vendor)
    built, installed = manifest.versions.get(manifest.vendor), here.get(manifest.vendor)
    if installed is None or built == installed:
        return None
    return f"built by {manifest.vendor} {built or 'unknown'}, here is {installed}"


def _built(folder: Path) -> Iterator[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return (path for path in paths if not path.name.startswith(".") and (path / MANIFEST_FILE).is_file())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
