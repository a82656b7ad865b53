"""A native engine from its folder: checked, and its memory read straight to the card.

The folder holds the memory of each part (`storages`), the compiled kernels of one kind of card, and native.json: what
the skeleton is made with, and of what code. Whatever of that is another here is refused in one line.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import engines.artifacts.native
import engines.backends.cuda
import engines.kernels
import engines.models
from engines.artifacts.loading import check_fit
from engines.artifacts.manifest import FileRecord, Manifest
from engines.artifacts.native.kernel_cache import cache_key_versions, use_compiled_kernels
from engines.artifacts.native.reading import read_weights
from engines.artifacts.native.skeleton import MODULE_NAMES, NativeModules, skeleton
from engines.artifacts.native.storages import attach_memory
from engines.backends import eager
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.weights import FolderWeights, WeightSource, weight_files
from engines.errors import ArtifactError
from engines.pipeline import native as pipeline_native
from engines.pipeline.native import NativeBackend

NATIVE_FILE = "native.json"
KERNELS = "kernels"  # folder of what Triton compiled


@dataclass(frozen=True)
class NativeInfo:
    """native.json. ranges: the largest input and hidden value of each ResBlock of a decoder in 8 bits, else empty."""

    code: str
    stamps: Sequence[Sequence[object]]
    ranges: Sequence[Sequence[float]]
    text: Mapping[str, object]  # parity of the text encoder

    def write(self, folder: Path) -> Path:
        path = folder / NATIVE_FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def load_native(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    device: torch.device,
    cache: Path,
    native: NativeBackend | None = None,
) -> NativeModules:
    """The engine in `folder`, checked and on the device.

    cache: folder of the proofs that kernels equal their references. native: whose operations run; None takes those of
    the card, which must be of the kind that the engine is for. Raises ArtifactError.
    """
    if native is None:
        check_fit(manifest, device)
    manifest.check_versions(package_versions())
    weights, small = _split(manifest.files)
    manifest.check_files(folder, small)
    for record in weights:
        manifest.check_size(folder, record)
    try:
        about = NativeInfo(**json.loads((folder / NATIVE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise manifest.refusal(f"{folder / NATIVE_FILE} is damaged ({error})") from error
    if about.code != code_digest():
        raise manifest.refusal("built by another version of this code")
    if not about.stamps or [list(stamp) for stamp in about.stamps] != file_stamps(checkpoint.weights):
        manifest.check_checkpoint(checkpoint.name, checkpoint.weights.sha256())
    if native is None:
        use_compiled_kernels((folder / KERNELS).absolute())
        shapes = f"{checkpoint.transformer} {manifest.sizes} {manifest.precision}"
        native = NativeBackend.on(device, checkpoint.autoencoder, cache, shapes)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_weights, [(folder / record.name, record.sha256) for record in weights], device)
        made = skeleton(checkpoint, native, about.ranges)
        try:
            attach_memory(made.memory, reading.result(), device)
        except (ValueError, ArtifactError) as error:
            raise manifest.refusal(str(error)) from error
    return made


def package_versions() -> dict[str, str]:
    """A CPU's torch may build for a GPU's: what follows the + in its version is left out."""
    return {"torch": torch.__version__.partition("+")[0], **cache_key_versions()}


def code_digest() -> str:
    """Of everything that decides what a skeleton is and which kernels it launches."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for package in (engines.kernels, engines.models, engines.backends.cuda, engines.artifacts.native):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))
    for module in (eager, pipeline_native):
        yield Path(str(module.__file__))


def file_stamps(weights: WeightSource) -> list[list[object]]:
    """Name, size and time of change of each file; equal ones need not be read to know that they are the same. Empty
    for weights that are no files."""
    if not isinstance(weights, FolderWeights):
        return []
    found: list[list[object]] = []
    for part in sorted(weights.folders.keys() - {"tokenizer"}):
        for path in weight_files(weights.folders[part], weights.variant):
            about = path.stat()
            found.append([f"{part}/{path.name}", about.st_size, about.st_mtime_ns])
    return found


def _split(files: Sequence[FileRecord]) -> tuple[list[FileRecord], list[FileRecord]]:
    """Weights, largest first, so that threads end together; and the small files that are checked before."""
    own = [file for file in files if file.name.split("-")[0] in MODULE_NAMES]
    small = [file for file in files if file.name == NATIVE_FILE or file.name.startswith(f"{KERNELS}/")]
    return sorted(own, key=lambda file: file.bytes, reverse=True), small
