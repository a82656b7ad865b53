"""manifest.json of a folder of built engines: checkpoint, machine, versions, files and parity.

A build writes it last, so a folder with a manifest is complete. A mismatch is an ArtifactError of one line: the
difference and the command that builds the engines again.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from engines.backends.base import ModuleName
from engines.checkpoints.weights import sha256_of
from engines.errors import ArtifactError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
NATIVE = "native"  # vendor of the engines of our own kernels


@dataclass(frozen=True)
class FileRecord:
    """A file beside the manifest."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, folder: Path | None = None) -> "FileRecord":
        """Reads size and hash of a file. folder: the manifest's, if the file lies in a subfolder."""
        name = path.name if folder is None else path.relative_to(folder).as_posix()
        return cls(name, path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Artifact:
    """One module at one size. `parity`: engines.backends.parity.Difference, the passed gate and the measured graph."""

    module: ModuleName
    size: tuple[int, int]  # (width, height) in pixels
    precision: str
    batches: tuple[int, ...]  # its own buckets; it runs a larger batch in parts
    seconds: float
    files: tuple[FileRecord, ...]
    parity: Mapping[str, object]
    details: Mapping[str, object]  # of the backend: layers per precision, activation memory


@dataclass(frozen=True)
class Manifest:
    """The facts that decide whether the artifacts may run here. Sizes are (width, height) in pixels."""

    checkpoint: str
    checkpoint_sha256: str
    decoder: str | None
    gpu: str
    device: str  # name of the GPU or CPU; of the target, if built ahead of time
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
    executed: bool  # the build ran it; otherwise its first load compares it with the references
    command: str
    fingerprint: str  # of all inputs of the build, its code included
    seconds: float
    pictures: Mapping[str, Mapping[str, object]]  # "WxH" -> parity of the decoded image, end to end
    references: Mapping[str, FileRecord]  # "WxH" -> the fp32 inputs and outputs (engines.artifacts.reference)
    artifacts: tuple[Artifact, ...]
    shared: tuple[FileRecord, ...] = ()  # files of no single module: text encoder, compiled kernels
    adapters: tuple[tuple[str, float], ...] = ()  # fused: name, scale; checkpoint_sha256 includes their weights
    format: int = FORMAT
    quality: Mapping[str, Mapping[str, object]] | None = None  # steps -> engines.build.paired_check (--quality)
    fast_decoder: str | None = None  # value of --fast-decoder; None: the engines hold one decoder
    fast_decoder_sha256: str | None = None  # engines.checkpoints.fingerprint.decoder_sha256

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> dict[str, object]:
        """Returns all but the hundreds of files of compiled kernels."""
        return {name: value for name, value in self.to_dict().items() if name != "shared"}

    @property
    def files(self) -> list[FileRecord]:
        own = (file for artifact in self.artifacts for file in artifact.files)
        return list(dict.fromkeys([*self.references.values(), *own, *self.shared]))

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def check_files(self, folder: Path, files: Iterable[FileRecord] | None = None) -> None:
        """Raises ArtifactError if one of `files` (None: all) is missing, truncated or changed."""
        for file in self.files if files is None else files:
            self.check_size(folder, file)
            path = folder / file.name
            if sha256_of(path) != file.sha256:
                raise self.refusal(f"{path} was changed since it was built")

    def check_size(self, folder: Path, file: FileRecord) -> None:
        """Raises ArtifactError if a file is missing or truncated."""
        path = folder / file.name
        if not path.is_file():
            raise self.refusal(f"{path} is missing")
        if path.stat().st_size != file.bytes:
            raise self.refusal(f"{path} has {path.stat().st_size} bytes, {file.bytes} were built")

    def check_versions(self, here: Mapping[str, str]) -> None:
        """Raises ArtifactError if another version of one of these packages built it."""
        for name, version in here.items():
            if self.versions.get(name) != version:
                raise self.refusal(f"built by {name} {self.versions.get(name)}, here is {version}")

    def check_checkpoint(self, name: str, sha256: str, decoder: str = "full") -> None:
        """Raises ArtifactError if the build used other weights, whatever their name. decoder: value of --decoder."""
        if sha256 != self.checkpoint_sha256:
            built = self.decoder or "full"
            if built != decoder:
                raise self.refusal(f"built with the decoder {built}, and started with {decoder} (--decoder)")
            raise self.refusal(
                f"built from {self.checkpoint} with weights {self.checkpoint_sha256[:12]}, and {name} has {sha256[:12]}"
            )

    def check_fast_decoder(self, name: str, sha256: str) -> None:
        """Raises ArtifactError if the build used another second decoder. name: value of --fast-decoder."""
        if sha256 == self.fast_decoder_sha256:
            return
        if name != self.fast_decoder:
            raise self.refusal(
                f"built with the fast decoder {self.fast_decoder}, and started with {name} (--fast-decoder)"
            )
        raise self.refusal(
            f"built with the fast decoder {name} of weights {(self.fast_decoder_sha256 or 'none')[:12]}, "
            f"and {name} has {sha256[:12]}"
        )

    def check_adapters(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Raises ArtifactError if the fused adapters (name, scale) are others than those of the start."""
        if tuple(adapters) != self.adapters:
            built, here = (
                ", ".join(f"{name}:{scale:g}" for name, scale in pairs) or "none" for pairs in (self.adapters, adapters)
            )
            raise self.refusal(f"built with the adapters {built}, and started with {here} (--lora NAME=PATH:SCALE)")

    def command_with(self, adapters: Sequence[object]) -> str:
        """Returns the command that builds it again with exactly these adapters (engines.types.AdapterOption)."""
        plain = re.sub(r" --lora (?:'[^']*'|\S+)", "", self.command)
        return " ".join([plain, *(f"--lora {shlex.quote(str(adapter))}" for adapter in adapters)])

    def command_with_fast_decoder(self, name: str) -> str:
        """Returns the command that builds it again with this second decoder."""
        return f"{self.command} --fast-decoder {shlex.quote(name)}"

    def check_machine(self, machine: str, capability: str | None, versions: Mapping[str, str]) -> None:
        """Raises ArtifactError if it is for another GPU, or another version of its vendor's package built it."""
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

    def refusal(self, difference: str) -> ArtifactError:
        """Returns an error with the difference and the command that builds the engines again."""
        return ArtifactError(f"engine: {difference}; build it again: {self.command}")


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json. Raises ArtifactError if it is missing, damaged or of another format."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(f"engine: {folder} has no {MANIFEST_FILE}; a folder made by build_engine.py is needed")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"engine: {path} is damaged ({error}); build it again with build_engine.py") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"engine: {path} has format {version}, this version reads {FORMAT}; build it again")
    try:
        return _manifest(values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"engine: {path} is damaged ({error!r}); build it again with build_engine.py") from error


def _manifest(values: Mapping[str, Any]) -> Manifest:
    missing = {field.name for field in fields(Manifest) if field.default is MISSING} - values.keys()
    if missing:
        raise KeyError(*sorted(missing))
    arguments = dict(values)
    arguments["artifacts"] = tuple(_artifact(value) for value in values["artifacts"])
    arguments["shared"] = tuple(FileRecord(**value) for value in values.get("shared", ()))
    arguments["references"] = {size: FileRecord(**value) for size, value in values["references"].items()}
    arguments["sizes"] = tuple(_pair(size) for size in values["sizes"])
    arguments["adapters"] = tuple((str(name), float(scale)) for name, scale in values.get("adapters", ()))
    for key in ("batches", "steps"):
        arguments[key] = tuple(int(value) for value in values[key])
    return Manifest(**arguments)


def _artifact(values: Mapping[str, Any]) -> Artifact:
    if values["module"] not in get_args(ModuleName):
        raise ValueError(f"module {values['module']!r}")
    files = tuple(FileRecord(**file) for file in values["files"])
    batches = tuple(int(batch) for batch in values["batches"])
    return Artifact(**{**values, "files": files, "size": _pair(values["size"]), "batches": batches})


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
