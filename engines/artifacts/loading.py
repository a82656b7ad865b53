"""Between a graph on disk and something that runs it: each backend's compiler and loader, by the manifest's words."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from engines.artifacts.manifest import Artifact, Manifest, read_manifest
from engines.artifacts.precision import module_dtype
from engines.artifacts.reference import MODULES, load_reference
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
from engines.device.hardware import dotted, package_versions, this_machine
from engines.errors import ParityError

CACHE = "cache"  # folder for what a backend compiles when it loads; not part of the artifacts


def open_artifact(backend: str, vendor: str, folder: Path, artifact: Artifact, scratch: Scratch) -> Graph:
    """scratch: what the engines of one GPU share. Raises ArtifactError, BackendError."""
    path = folder / artifact.files[0].name
    cache = folder / CACHE / f"{path.stem}-{_digest(artifact)}"  # other files under the same names never meet
    if backend == "openvino":
        return OpenVinoGraph(path, cast(CpuPrecision, artifact.precision), artifact.batches, cache)
    jit_cache = cache.with_suffix(".jit")
    return TensorRtGraph(vendors.vendor(vendor), path, artifact.batches, jit_cache, scratch)


def _digest(artifact: Artifact) -> str:
    return hashlib.sha256(" ".join(file.sha256 for file in artifact.files).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DropIns:
    """In place of the modules, at every size of the manifest."""

    transformer: TransformerAdapter
    decoder: DecoderAdapter
    encoder: EncoderAdapter


@dataclass(frozen=True)
class LoadedModules:
    """Opened artifacts."""

    manifest: Manifest
    dtype: torch.dtype  # of the transformer's inputs
    graphs: Mapping[ModuleName, Mapping[HeightWidth, Graph]]

    def replica(self) -> DropIns:
        """Drop-ins with execution contexts of their own, as each CUDA graph needs them, on the same weights."""
        own = {name: {side: _replica(graph) for side, graph in at.items()} for name, at in self.graphs.items()}
        return DropIns(
            TransformerAdapter(only_built_sizes(own["transformer"]), self.manifest.tokens),
            DecoderAdapter(only_built_sizes(own["decoder"])),
            EncoderAdapter(only_built_sizes(own["encoder"])),
        )


def load_artifacts(folder: Path, checkpoint: Checkpoint, device: torch.device) -> LoadedModules:
    """Everything in `folder`, checked: files, checkpoint, machine, on first load what could not be checked before, and
    on every load what was compiled by an earlier process.

    Raises ArtifactError, BackendError, ParityError.
    """
    manifest = read_manifest(folder)
    check_fit(manifest, device)
    manifest.check_files(folder)
    manifest.check_checkpoint(checkpoint.name, checkpoint.weights.sha256())
    graphs: dict[ModuleName, dict[HeightWidth, Graph]] = {name: {} for name in MODULES}
    scratch = Scratch(device)
    kept: list[tuple[Artifact, OpenVinoGraph | TensorRtGraph]] = []
    for artifact in manifest.artifacts:
        width, height = artifact.size
        unit = 1 if artifact.module == "encoder" else checkpoint.autoencoder.compression
        graph = open_artifact(manifest.backend, manifest.vendor, folder, artifact, scratch)
        graphs[artifact.module][height // unit, width // unit] = graph
        if isinstance(graph, OpenVinoGraph | TensorRtGraph) and graph.from_cache:
            kept.append((artifact, graph))
    dtype = module_dtype(manifest.precision)
    if manifest.backend == "openvino":
        dtype = torch.float32  # it rounds inside
    if not manifest.executed:
        _check_first_run(manifest, folder, graphs, dtype, device, checkpoint.autoencoder.compression)
    for artifact, graph in kept:
        _check_kept(manifest, folder, artifact, graph, dtype, device)
    return LoadedModules(manifest, dtype, graphs)


def _replica(graph: Graph) -> Graph:
    return graph.replica() if isinstance(graph, TensorRtGraph) else graph


def check_fit(manifest: Manifest, device: torch.device) -> None:
    """Raises ArtifactError where `manifest` is for another machine; needs no files."""
    machine = this_machine()
    capability = dotted(machine.capability) if device.type == "cuda" and machine.capability else None
    manifest.check_machine(machine.words, capability, package_versions(manifest.vendor))


def _check_first_run(
    manifest: Manifest,
    folder: Path,
    graphs: Mapping[ModuleName, Mapping[HeightWidth, Graph]],
    dtype: torch.dtype,
    device: torch.device,
    compression: int,
) -> None:
    """Compares engines that never ran where they were built with the references that lie beside them."""
    precisions = {(artifact.module, artifact.size): artifact.precision for artifact in manifest.artifacts}
    for size, record in manifest.references.items():
        width, height = (int(side) for side in size.split("x"))

        def at(name: ModuleName, height: int = height, width: int = width) -> Graph:
            unit = 1 if name == "encoder" else compression
            return graphs[name][height // unit, width // unit]

        found, picture = load_reference(folder / record.name).compare(at, dtype, device)
        try:
            for name, distance in found.items():
                GATES[precisions[name, (width, height)]].check(f"{name} at {size}", distance)
            IMAGE_GATES[manifest.precision].check(f"picture at {size}", picture)
        except ParityError as error:
            raise ParityError(
                f"engine: first run on this machine: {error}; build it again: {manifest.command}"
            ) from error


def _check_kept(
    manifest: Manifest,
    folder: Path,
    artifact: Artifact,
    graph: OpenVinoGraph | TensorRtGraph,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compares what came out of a cache, bucket by bucket, with the reference that lies beside it."""
    size = f"{artifact.size[0]}x{artifact.size[1]}"
    reference = load_reference(folder / manifest.references[size].name)
    inputs, expected = reference.inputs(artifact.module, dtype, device), reference.output(artifact.module)
    for bucket in graph.from_cache:
        rows = {name: _rows(value, bucket) for name, value in inputs.items()}
        try:
            found = difference(_rows(expected, bucket), graph(rows)[0])
            GATES[artifact.precision].check(f"{artifact.module} at {size} in batches of {bucket}", found)
        except ParityError as error:
            raise ParityError(f"engine: compiled earlier: {error}; remove {folder / CACHE}") from error


def _rows(value: Tensor, count: int) -> Tensor:
    return pad_batch(value, count) if value.shape[0] < count else value[:count]
