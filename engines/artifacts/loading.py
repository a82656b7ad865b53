"""Opens built engines: checks a folder against its manifest and gives each graph to its backend."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from engines.artifacts.manifest import Artifact, Manifest, read_manifest
from engines.artifacts.precision import module_dtype
from engines.artifacts.reference import Reference, built_modules
from engines.backends.adapters import (
    DecoderAdapter,
    EncoderAdapter,
    Graph,
    HeightWidth,
    TransformerAdapter,
    only_built_sizes,
    pad_batch,
)
from engines.backends.base import ModuleName
from engines.backends.openvino import CpuPrecision, OpenVinoGraph
from engines.backends.parity import GATES, IMAGE_GATES, difference
from engines.backends.tensorrt import vendor as vendors
from engines.backends.tensorrt.runtime import Scratch, TensorRtGraph
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.fingerprint import decoder_sha256
from engines.device.hardware import capability_text, package_versions, this_machine
from engines.errors import ParityError

CACHE = "cache"  # folder of what backends compile at load; not part of the artifacts


def open_artifact(backend: str, vendor: str, folder: Path, artifact: Artifact, scratch: Scratch) -> Graph:
    """Opens one artifact. scratch: memory that the engines of one GPU share. Raises ArtifactError, BackendError."""
    path = folder / artifact.files[0].name
    cache = folder / CACHE / f"{path.stem}-{_digest(artifact)}"  # other files of the same name get another cache
    if backend == "openvino":
        return OpenVinoGraph(path, cast(CpuPrecision, artifact.precision), artifact.batches, cache)
    jit_cache = cache.with_suffix(".jit")
    return TensorRtGraph(vendors.vendor(vendor), path, artifact.batches, jit_cache, scratch)


def _digest(artifact: Artifact) -> str:
    return hashlib.sha256(" ".join(file.sha256 for file in artifact.files).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EngineModules:
    """Callables that replace the modules, at every size of the manifest."""

    transformer: TransformerAdapter
    decoder: DecoderAdapter
    encoder: EncoderAdapter
    fast_decoder: DecoderAdapter | None = None


@dataclass(frozen=True)
class LoadedModules:
    """The opened artifacts of a folder."""

    manifest: Manifest
    dtype: torch.dtype  # of the transformer's inputs
    graphs: Mapping[ModuleName, Mapping[HeightWidth, Graph]]

    def new_context(self) -> EngineModules:
        """Returns modules with execution contexts of their own, which each CUDA graph needs, on the same weights."""
        own = {
            name: {
                side: graph.new_context() if isinstance(graph, TensorRtGraph) else graph for side, graph in at.items()
            }
            for name, at in self.graphs.items()
        }
        return EngineModules(
            TransformerAdapter(only_built_sizes(own["transformer"]), self.manifest.tokens),
            DecoderAdapter(only_built_sizes(own["decoder"])),
            EncoderAdapter(only_built_sizes(own["encoder"])),
            DecoderAdapter(only_built_sizes(own["fast_decoder"])) if "fast_decoder" in own else None,
        )


def load_artifacts(
    folder: Path, checkpoint: Checkpoint, device: torch.device, fast: Checkpoint | None = None
) -> LoadedModules:
    """Opens everything in `folder` and checks files, checkpoint and machine.

    fast: with the second decoder of the engine, which must be that of this checkpoint; without it none is opened.
    Compares with the references: on the first load, engines that never ran; on every load, what an earlier process
    compiled. Raises ArtifactError, BackendError, ParityError.
    """
    manifest = read_manifest(folder)
    check_fit(manifest, device)
    manifest.check_files(folder)
    manifest.check_checkpoint(checkpoint.name, checkpoint.weights.sha256(), checkpoint.decoder)
    if fast is not None:
        manifest.check_fast_decoder(fast.decoder, decoder_sha256(fast))
    graphs: dict[ModuleName, dict[HeightWidth, Graph]] = {name: {} for name in built_modules(fast=fast is not None)}
    scratch = Scratch(device)
    cached: list[tuple[Artifact, OpenVinoGraph | TensorRtGraph]] = []
    for artifact in (one for one in manifest.artifacts if one.module in graphs):
        width, height = artifact.size
        unit = 1 if artifact.module == "encoder" else checkpoint.autoencoder.compression
        graph = open_artifact(manifest.backend, manifest.vendor, folder, artifact, scratch)
        graphs[artifact.module][height // unit, width // unit] = graph
        if isinstance(graph, OpenVinoGraph | TensorRtGraph) and graph.from_cache:
            cached.append((artifact, graph))
    dtype = module_dtype(manifest.precision)
    if manifest.backend == "openvino":
        dtype = torch.float32  # OpenVINO rounds inside
    if not manifest.executed:
        _check_first_run(manifest, folder, graphs, dtype, device, checkpoint.autoencoder.compression)
    for artifact, graph in cached:
        _check_cached(manifest, folder, artifact, graph, dtype, device)
    return LoadedModules(manifest, dtype, graphs)


def check_fit(manifest: Manifest, device: torch.device) -> None:
    """Raises ArtifactError if `manifest` is for another machine; reads no files."""
    machine = this_machine()
    capability = capability_text(machine.capability) if device.type == "cuda" and machine.capability else None
    manifest.check_machine(machine.label, capability, package_versions(manifest.vendor))


def _check_first_run(
    manifest: Manifest,
    folder: Path,
    graphs: Mapping[ModuleName, Mapping[HeightWidth, Graph]],
    dtype: torch.dtype,
    device: torch.device,
    compression: int,
) -> None:
    """Compares engines that did not run on the machine of their build with the references beside them."""
    precisions = {(artifact.module, artifact.size): artifact.precision for artifact in manifest.artifacts}
    for size, record in manifest.references.items():
        width, height = (int(side) for side in size.split("x"))

        def at(name: ModuleName, height: int = height, width: int = width) -> Graph:
            unit = 1 if name == "encoder" else compression
            return graphs[name][height // unit, width // unit]

        reference = Reference.load(folder / record.name)
        modules, image = reference.compare(at, dtype, device, fast="fast_decoder" in graphs)
        try:
            for name, distance in modules.items():
                GATES[precisions[name, (width, height)]].check(f"{name} at {size}", distance)
            IMAGE_GATES[manifest.precision].check(f"image at {size}", image)
        except ParityError as error:
            raise ParityError(
                f"engine: first run on this machine: {error}; build it again: {manifest.command}"
            ) from error


def _check_cached(
    manifest: Manifest,
    folder: Path,
    artifact: Artifact,
    graph: OpenVinoGraph | TensorRtGraph,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compares a graph from a cache, bucket by bucket, with the reference beside it."""
    size = f"{artifact.size[0]}x{artifact.size[1]}"
    reference = Reference.load(folder / manifest.references[size].name)
    inputs, expected = reference.inputs(artifact.module, dtype, device), reference.output(artifact.module)
    for bucket in graph.from_cache:
        rows = {name: _rows(value, bucket) for name, value in inputs.items()}
        try:
            distance = difference(_rows(expected, bucket), graph(rows)[0])
            GATES[artifact.precision].check(f"{artifact.module} at {size} in batches of {bucket}", distance)
        except ParityError as error:
            raise ParityError(f"engine: compiled earlier: {error}; remove {folder / CACHE}") from error


def _rows(value: Tensor, count: int) -> Tensor:
    return pad_batch(value, count) if value.shape[0] < count else value[:count]
