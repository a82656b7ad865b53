"""manifest.json of a folder of built engines: what they were built from, for what, and how far they are off.

It is written last, so a folder with a manifest is whole. Everything that does not fit is an ArtifactError of one line:
what differs, and the command that builds it again.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from engines.backends.base import ModuleName
from engines.errors import ArtifactError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
NATIVE = "native"  # the vendor of engines made of our own kernels


@dataclass(frozen=True)
class FileRecord:
    """A file beside the manifest."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, folder: Path | None = None) -> "FileRecord":
        """folder: the manifest's, where the file lies deeper in it."""
        name = path.name if folder is None else path.relative_to(folder).as_posix()
        return cls(name, path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Artifact:
    """One module at one size. `parity`: engines.backends.parity.Difference, the gate that was kept, and of what it was
    taken."""

    module: ModuleName
    size: tuple[int, int]  # (width, height) in pixels
    precision: str
    batches: tuple[int, ...]  # its own buckets; a larger batch runs in pieces
    seconds: float
    files: tuple[FileRecord, ...]
    parity: Mapping[str, object]
    details: Mapping[str, object]  # what the backend has to tell: layers per precision, activation memory


@dataclass(frozen=True)
class Manifest:
    """Everything that decides whether the artifacts may run here. Sizes are (width, height) in pixels."""

    checkpoint: str
    checkpoint_sha256: str
    decoder: str | None
    gpu: str
    device: str  # name of the GPU, of the CPU, or of the target where it was built ahead of time
    compute_capability: str | None
    driver: str | None
    backend: str
    vendor: str
    precision: str
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    tokens: int
    versions: Mapping[str, str]
    executed: bool  # ran where it was built; otherwise it is compared with the references when it is first loaded
    command: str
    fingerprint: str  # of everything above, and of the code that builds
    seconds: float
    pictures: Mapping[str, Mapping[str, object]]  # "WxH" -> parity of the decoded image, end to end
    references: Mapping[str, FileRecord]  # "WxH" -> the fp32 inputs and outputs (engines.artifacts.reference)
    artifacts: tuple[Artifact, ...]
    shared: tuple[FileRecord, ...] = ()  # what is no one module's: the text encoder, compiled kernels
    adapters: tuple[tuple[str, float], ...] = ()  # fused: name and scale; their weights are in checkpoint_sha256
    format: int = FORMAT
    quality: Mapping[str, Mapping[str, object]] | None = None  # steps -> engines.build.paired_check, where asked for

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> dict[str, object]:
        """All but the files of the kernels, which are hundreds."""
        return {name: value for name, value in self.to_dict().items() if name != "shared"}

    @property
    def files(self) -> list[FileRecord]:
        own = (file for artifact in self.artifacts for file in artifact.files)
        return list(dict.fromkeys([*self.references.values(), *own, *self.shared]))

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def check_files(self, folder: Path, some: Iterable[FileRecord] | None = None) -> None:
        """Raises ArtifactError where a file, or one of some, is absent, cut short or changed."""
        for file in self.files if some is None else some:
            self.check_size(folder, file)
            path = folder / file.name
            if sha256_of(path) != file.sha256:
                raise self.refusal(f"{path} was changed since it was built")

    def check_size(self, folder: Path, file: FileRecord) -> None:
        """Raises ArtifactError where a file is absent or cut short."""
        path = folder / file.name
        if not path.is_file():
            raise self.refusal(f"{path} is missing")
        if path.stat().st_size != file.bytes:
            raise self.refusal(f"{path} has {path.stat().st_size} bytes, {file.bytes} were built")

    def check_versions(self, here: Mapping[str, str]) -> None:
        """Raises ArtifactError where it was built by another version of one of these packages."""
        for name, version in here.items():
            if self.versions.get(name) != version:
                raise self.refusal(f"built by {name} {self.versions.get(name)}, here is {version}")

    def check_checkpoint(self, name: str, sha256: str) -> None:
        """Raises ArtifactError where the weights are not those it was built from, whatever they are called."""
        if sha256 != self.checkpoint_sha256:
            raise self.refusal(
                f"built from {self.checkpoint} with weights {self.checkpoint_sha256[:12]}, and {name} has {sha256[:12]}"
            )

    def check_adapters(self, given: Sequence[tuple[str, float]]) -> None:
        """Raises ArtifactError where other adapters (name and scale) were fused than are given at start."""
        if tuple(given) != self.adapters:
            built, here = (
                ", ".join(f"{name}:{scale:g}" for name, scale in some) or "none" for some in (self.adapters, given)
            )
            raise self.refusal(f"built with the adapters {built}, and started with {here} (--lora NAME=PATH:SCALE)")

    def command_with(self, adapters: Sequence[object]) -> str:
        """The command that builds it again with these adapters (engines.types.AdapterOption) alone."""
        plain = re.sub(r" --lora (?:'[^']*'|\S+)", "", self.command)
        return " ".join([plain, *(f"--lora {shlex.quote(str(adapter))}" for adapter in adapters)])

    def check_machine(self, machine: str, capability: str | None, versions: Mapping[str, str]) -> None:
        """Raises ArtifactError where it was built for another GPU, or by another version of its vendor's package."""
        if self.compute_capability != capability:
            instead = "--gpu native" if capability else "--gpu cpu --precision fp32"
            command = re.sub(
                r"--gpu \S+( --precision \S+)?", lambda m: instead + (m[1] or "" if capability else ""), self.command
            )
            if capability is None:  # a CPU's engines have one vendor
                command = re.sub(r" --vendor \S+", "", command)
            raise ArtifactError(
                f"engine: built for {self.device} (compute capability {self.compute_capability or 'none'}), "
                f"this machine has {machine}; for this one: {command}"
            )
        built, here = self.versions.get(self.vendor), versions.get(self.vendor)
        if built != here and self.backend == "tensorrt":
            raise self.refusal(f"built by {self.vendor} {built}, here is {here or 'none'}")

    def refusal(self, what: str) -> ArtifactError:
        """To be raised: what differs, and the command that builds it again."""
        return ArtifactError(f"engine: {what}; build it again: {self.command}")


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactError where there is none, or one that this version did not write."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(f"engine: {folder} has no {MANIFEST_FILE}; a folder made by build_engine.py is needed")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"engine: {path} is damaged ({error}); build it again with build_engine.py") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"engine: {path} has format {found}, this version reads {FORMAT}; build it again")
    try:
        return _manifest(values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"engine: {path} is damaged ({error!r}); build it again with build_engine.py") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(values: Mapping[str, Any]) -> Manifest:
    missing = {field.name for field in fields(Manifest) if field.default is MISSING} - values.keys()
    if missing:
        raise KeyError(*sorted(missing))
    given = dict(values)
    given["artifacts"] = tuple(_artifact(value) for value in values["artifacts"])
    given["shared"] = tuple(FileRecord(**value) for value in values.get("shared", ()))
    given["references"] = {size: FileRecord(**value) for size, value in values["references"].items()}
    given["sizes"] = tuple(_pair(size) for size in values["sizes"])
    given["adapters"] = tuple((str(name), float(scale)) for name, scale in values.get("adapters", ()))
    for key in ("batches", "steps"):
        given[key] = tuple(int(value) for value in values[key])
    return Manifest(**given)


def _artifact(values: Mapping[str, Any]) -> Artifact:
    if values["module"] not in get_args(ModuleName):
        raise ValueError(f"module {values['module']!r}")
    files = tuple(FileRecord(**file) for file in values["files"])
    batches = tuple(int(batch) for batch in values["batches"])
    return Artifact(**{**values, "files": files, "size": _pair(values["size"]), "batches": batches})


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
