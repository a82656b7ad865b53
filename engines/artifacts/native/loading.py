"""Loads a native engine: checks its folder and reads the memory of its modules to the GPU.

The folder holds the memory of each component (`storages`) and the compiled kernels of one GPU type. Its native.json
holds the inputs of the skeleton and the hash of the code. An ArtifactError names the first difference.
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
from engines.checkpoints.fingerprint import decoder_sha256, decoder_stamps
from engines.checkpoints.weights import file_stamps
from engines.errors import ArtifactError
from engines.pipeline import native as pipeline_native
from engines.pipeline.native import NativeBackend, Ranges

NATIVE_FILE = "native.json"
KERNELS = "kernels"  # folder of compiled kernels


@dataclass(frozen=True)
class NativeInfo:
    """native.json. ranges: of calibration for an engine in fp8; else empty."""

    code: str
    stamps: Sequence[Sequence[object]]
    ranges: Ranges
    text: Mapping[str, object]  # parity of the text encoder
    fast_stamps: Sequence[Sequence[object]] = ()  # of the second decoder

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
    shapes: str,
    native: NativeBackend | None = None,
    fast: Checkpoint | None = None,
) -> NativeModules:
    """Checks the engine in `folder` and loads it to the device.

    cache: folder of the proofs that kernels equal their references. shapes: of the kernels' inputs, as
    engines.pipeline.limits.shapes_of tells them. native: the operations that run; None takes those of the GPU, which
    must be of the engine's type. fast: with the second decoder of the engine, which must be that of this checkpoint.
    Raises ArtifactError.
    """
    if native is None:
        check_fit(manifest, device)
    manifest.check_versions(package_versions())
    weights, small = _split(manifest.files, with_fast=fast is not None)
    manifest.check_files(folder, small)
    for record in weights:
        manifest.check_size(folder, record)
    try:
        info = NativeInfo(**json.loads((folder / NATIVE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise manifest.refusal(f"{folder / NATIVE_FILE} is damaged ({error})") from error
    if info.code != code_digest():
        raise manifest.refusal("built by another version of this code")
    if not info.stamps or [list(stamp) for stamp in info.stamps] != file_stamps(checkpoint.weights):
        manifest.check_checkpoint(checkpoint.name, checkpoint.weights.sha256(), checkpoint.decoder)
    if fast is not None and (not info.fast_stamps or [*map(list, info.fast_stamps)] != decoder_stamps(fast)):
        manifest.check_fast_decoder(fast.decoder, decoder_sha256(fast))
    if native is None:
        use_compiled_kernels((folder / KERNELS).absolute())
        native = NativeBackend.on(device, checkpoint.autoencoder, cache, shapes)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_weights, [(folder / record.name, record.sha256) for record in weights], device)
        modules = skeleton(checkpoint, native, info.ranges, fast)
        try:
            attach_memory(modules.memory, reading.result(), device)
        except (ValueError, ArtifactError) as error:
            raise manifest.refusal(str(error)) from error
    return modules


def package_versions() -> dict[str, str]:
    """Returns the versions that must agree; without the +suffix of torch, as its CPU wheel may build for a GPU."""
    return {"torch": torch.__version__.partition("+")[0], **cache_key_versions()}


def code_digest() -> str:
    """Returns the hash of all sources that decide the skeleton and the kernels that it launches."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for package in (engines.kernels, engines.models, engines.backends.cuda, engines.artifacts.native):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))
    for module in (eager, pipeline_native):
        yield Path(str(module.__file__))


def _split(files: Sequence[FileRecord], *, with_fast: bool) -> tuple[list[FileRecord], list[FileRecord]]:
    """Returns the weights, largest first so that threads end together, and the small files that are checked first."""
    modules = MODULE_NAMES if with_fast else MODULE_NAMES[:-1]
    weights = [file for file in files if file.name.split("-")[0] in modules]
    small = [file for file in files if file.name == NATIVE_FILE or file.name.startswith(f"{KERNELS}/")]
    return sorted(weights, key=lambda file: file.bytes, reverse=True), small
