"""From a checkpoint to a folder of engines: reference, export, compilation, parity gate, manifest; all or nothing.

Order: the fp32 reference of every size first, then each module once in its own precision, so that no two large modules
are in memory together. A build whose inputs have not changed does nothing.
"""

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.artifacts.loading import open_artifact
from engines.artifacts.manifest import NATIVE, Artifact, FileRecord, Manifest, read_manifest
from engines.artifacts.precision import module_dtype, module_precision
from engines.artifacts.reference import MODULES, Reference, clean_latent, load_reference, peaks, starting_point
from engines.backends.adapters import Graph
from engines.backends.base import ModuleName
from engines.backends.parity import GATES, IMAGE_GATES
from engines.backends.tensorrt.runtime import Scratch, TensorRtGraph
from engines.build.atomic_directory import staging
from engines.build.compilation import compile_graph
from engines.build.example_inputs import GraphShape, probe_inputs
from engines.build.fp8_coverage import fp8_share
from engines.build.native import NATIVE_STEPS, Pieces, native_pieces, native_versions
from engines.build.onnx_export import export_onnx, onnx_files
from engines.build.onnx_runner import OnnxGraph
from engines.build.quantization import exporting, narrowed, quantize
from engines.build.spec import BuildSpec, Size, completed, fingerprint_of, words
from engines.build.targets import Target, resolve
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engines.checkpoints.lora import with_adapters
from engines.device.hardware import Machine, dotted, package_versions, this_machine
from engines.errors import ArtifactError, BuildError
from engines.models.folding import fold
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.pipeline.calibration import calibration_texts

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what comes next

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TIMING = "timing.cache"  # TensorRT's, carried from the engines that a build replaces to those it makes
_FP16_LARGEST = 65504
_FP8_SHARE = 0.85
_VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "modelopt", "openvino", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Built:
    """The manifest, and whether anything had to be done for it."""

    manifest: Manifest
    changed: bool


def silent(done: int, total: int, text: str) -> None:
    """A Progress that nobody watches."""


def build(spec: BuildSpec, progress: Progress = silent) -> Built:
    """Builds what `spec` asks for, or finds that it is there.

    Raises BuildError (refused, failed or disk full), ParityError (built, and too far from the reference),
    CheckpointError, BackendError. Nothing is left behind then; engines that were in `out` stay as they were.
    """
    machine = this_machine()
    target = resolve(spec.gpu, spec.precision, machine, vendor=spec.vendor)
    checkpoint = open_checkpoint(spec.model, spec.decoder)
    spec = completed(spec, checkpoint)
    checkpoint, _ = with_adapters(checkpoint, spec.lora, {})
    sha256 = checkpoint.weights.sha256()
    versions = package_versions(*_VERSIONS)
    if target.vendor == NATIVE:
        spec, versions = replace(spec, vendor=NATIVE), {**versions, **native_versions()}
    fingerprint = fingerprint_of(spec, target, sha256, versions)
    present = _unchanged(spec.out, fingerprint)
    if present is not None:
        return Built(present, changed=False)
    with staging(spec.out) as folder:
        started = time.perf_counter()
        if (spec.out / TIMING).is_file():
            shutil.copy(spec.out / TIMING, folder)
        work = _Work(spec, checkpoint, target, folder, progress)
        references = work.references()
        pieces = native_pieces(work, references) if target.vendor == NATIVE else work.pieces(references)
        manifest = Manifest(
            checkpoint=spec.model,
            checkpoint_sha256=sha256,
            decoder=spec.decoder,
            gpu=spec.gpu,
            device=_device_name(target, machine),
            compute_capability=dotted(target.capability) if target.capability else None,
            driver=machine.driver if target.executable and target.capability else None,
            backend=target.backend,
            vendor=target.vendor,
            precision=spec.precision,
            sizes=spec.sizes,
            batches=spec.batches,
            steps=spec.steps,
            tokens=checkpoint.settings.max_prompt_tokens,
            versions=versions,
            executed=target.executable,
            command=spec.command,
            fingerprint=fingerprint,
            seconds=round(time.perf_counter() - started, 1),
            pictures=pieces.pictures,
            references={words(size): FileRecord.of(folder / _reference_file(size)) for size in spec.sizes},
            artifacts=pieces.artifacts,
            shared=pieces.shared,
            adapters=tuple((one.name, one.scale or 0.0) for one in spec.lora),
        )
        manifest.write(folder)
    return Built(manifest, changed=True)


Key = tuple[ModuleName, Size]


@dataclass(frozen=True)
class _Graph:
    path: Path
    seconds: float
    fp8_share: float | None = None  # of the matrix arithmetic


@dataclass
class _Work:
    """One build under way, in its temporary folder."""

    spec: BuildSpec
    checkpoint: Checkpoint
    target: Target
    folder: Path
    progress: Progress
    done: int = 0
    precisions: dict[ModuleName, str] = field(default_factory=dict)  # settled by the reference
    reasons: dict[ModuleName, str] = field(default_factory=dict)  # for a precision that was not asked for
    layers: dict[Key, dict[str, object]] = field(default_factory=dict)  # what the inspector tells of built engines

    @property
    def total(self) -> int:
        """Steps. Each size: reference of 2 modules, then export, compilation and parity of 3; native: parity alone."""
        if self.target.vendor == NATIVE:
            return NATIVE_STEPS + len(self.spec.sizes) * (2 + len(MODULES))
        return len(self.spec.sizes) * (2 + 3 * len(MODULES))

    def step(self, text: str) -> None:
        self.progress(self.done, self.total, text)
        self.done += 1

    def references(self) -> dict[Size, Path]:
        """The fp32 reference of each size, on disk; settles the precision of each module."""
        rows = min(2, max(self.spec.batches))
        texts = calibration_texts(self.checkpoint).rows(rows)
        found: dict[Size, dict[str, Tensor]] = {}
        module: nn.Module = self.checkpoint.load_transformer(torch.float32, CPU)
        with torch.inference_mode(), peaks(module) as seen:
            for size in self.spec.sizes:
                self.step(f"reference of the transformer at {words(size)}")
                shape = self.shape(size)
                noise = probe_inputs("decoder", shape, rows, torch.float32)["latent"]
                latent, time_, guidance = starting_point(noise)
                inputs = {"latent": latent, "text": texts.states, "timestep": time_, "guidance": guidance}
                inputs["text_mask"] = texts.mask
                velocity = module(**inputs)
                found[size] = {**inputs, "velocity": velocity, "clean": clean_latent(latent, velocity, time_)}
        self.settle("transformer", seen)
        del module
        autoencoder = self.checkpoint.load_autoencoder(torch.float32, CPU)
        decoder, encoder = PixelDecoder(autoencoder), PixelEncoder(autoencoder)
        with torch.inference_mode(), peaks(decoder) as seen, peaks(encoder) as seen_encoding:
            for size, tensors in found.items():
                self.step(f"reference of the autoencoder at {words(size)}")
                # Row by row, because the largest stage of one row alone takes gigabytes at full size.
                tensors["pixels"] = torch.cat([decoder(row[None])[0] for row in tensors["clean"]])
                tensors["encoded"] = torch.cat([encoder(row[None]) for row in tensors["pixels"]])
        self.settle("decoder", seen)
        self.settle("encoder", seen_encoding)
        paths = {size: self.folder / _reference_file(size) for size in found}
        for size, path in paths.items():
            Reference(found[size]).save(path)
        return paths

    def pieces(self, references: Mapping[Size, Path]) -> Pieces:
        """Everything by way of ONNX, for the compiler of another vendor."""
        graphs = self.graphs()
        if not self.target.executable:
            parity, pictures = self.parity(references, lambda name, size: OnnxGraph(graphs[name, size].path), "graph")
        compiled = self.compiled(graphs)
        if self.target.executable:
            parity, pictures = self.parity(references, lambda name, size: self.open(compiled[name, size]), "engine")
        details = {key: {**made.details, **self.layers.get(key, {})} for key, made in compiled.items()}
        artifacts = (replace(made, parity=parity[key], details=details[key]) for key, made in compiled.items())
        return Pieces(tuple(artifacts), pictures)

    def settle(self, name: ModuleName, seen: Mapping[str, float]) -> None:
        """The precision of one module: as asked for, but bf16 for an autoencoder that overflows fp16.

        Upstream advises bf16 or fp32 for the autoencoder; published ones are known to overflow (diffusers issues 9982,
        10241). Raises BuildError where it is the transformer that overflows.
        """
        if self.target.vendor == NATIVE:
            return  # bf16 throughout, and no number of a checkpoint overflows that
        precision = module_precision(self.spec.precision, name)
        part, peak = max(seen.items(), key=lambda pair: pair[1])
        if module_dtype(precision) == torch.float16 and peak * 2 > _FP16_LARGEST:
            reason = f"{name}.{part} reaches {peak:.0f} on real prompts, and fp16 holds {_FP16_LARGEST}"
            if name == "transformer":
                raise BuildError(f"precision: {reason}; build with --precision bf16")
            self.reasons[name] = reason
            precision = "bf16"
        self.precisions[name] = precision

    def graphs(self) -> dict[Key, _Graph]:
        """Every module at every size as ONNX, each module loaded once."""
        found: dict[Key, _Graph] = {}
        for name in MODULES:
            module = self.module(name)
            for size in self.spec.sizes:
                self.step(f"export of the {name} at {words(size)}")
                found[name, size] = self.export(module, name, size)
            del module
            gc.collect()
        return found

    def export(self, module: nn.Module, name: ModuleName, size: Size) -> _Graph:
        """Raises BuildError where fp8 was asked for and reaches too little of the arithmetic."""
        started = time.perf_counter()
        path = self.folder / f"{name}-{words(size)}.onnx"
        inputs = probe_inputs(name, self.shape(size), 2, self.dtype(name))
        if self.precisions[name] != "fp8":
            export_onnx(module, name, inputs, path)
            return _Graph(path, time.perf_counter() - started)
        with exporting() as translations:
            export_onnx(module, name, inputs, path, translations)
        share = fp8_share(path)
        if share < _FP8_SHARE:
            raise BuildError(
                f"{path.stem}: fp8 reaches {share:.0%} of the matrix arithmetic, {_FP8_SHARE:.0%} is needed"
            )
        return _Graph(path, time.perf_counter() - started, share)

    def module(self, name: ModuleName) -> nn.Module:
        """One module in the precision that is to run."""
        dtype = self.dtype(name)
        if name == "transformer" and self.precisions[name] == "fp8":
            self.progress(self.done, self.total, "calibration of the transformer")
            exact = self.checkpoint.load_transformer(torch.float32, CPU)
            sides = [(shape.height, shape.width) for shape in map(self.shape, self.spec.sizes)]
            texts, channels = calibration_texts(self.checkpoint), self.checkpoint.transformer.in_channels
            return narrowed(quantize(exact, texts, sides, self.spec.steps, channels), dtype)
        if name == "transformer":
            return self.checkpoint.load_transformer(dtype, CPU)
        autoencoder = self.checkpoint.load_autoencoder(dtype, CPU)
        if name == "encoder":
            return PixelEncoder(autoencoder)
        fold(autoencoder.decoder)
        return PixelDecoder(autoencoder)

    def compiled(self, graphs: Mapping[Key, _Graph]) -> dict[Key, Artifact]:
        """The artifacts, still without their parity; the graphs are removed."""
        found: dict[Key, Artifact] = {}
        for (name, size), graph in graphs.items():
            self.step(f"compilation of the {name} at {words(size)}")
            started = time.perf_counter()
            batches = self.batches(name, size)
            made = compile_graph(self.target, graph.path, graph.path.with_suffix(""), batches, self.folder / TIMING)
            for path in onnx_files(graph.path):
                path.unlink()
            seconds = round(graph.seconds + time.perf_counter() - started, 1)
            files = tuple(FileRecord.of(path) for path in made.files)
            share = {} if graph.fp8_share is None else {"fp8_share": round(graph.fp8_share, 4)}
            details = {**made.details, **share, **({"reason": self.reasons[name]} if name in self.reasons else {})}
            found[name, size] = Artifact(name, size, self.precisions[name], batches, seconds, files, {}, details)
        return found

    def parity(
        self, references: Mapping[Size, Path], open_graph: Callable[[ModuleName, Size], Graph], of: str
    ) -> tuple[dict[Key, dict[str, object]], dict[str, dict[str, object]]]:
        """Distances and kept gates, of the modules and of the pictures. Raises ParityError."""
        modules: dict[Key, dict[str, object]] = {}
        pictures: dict[str, dict[str, object]] = {}
        for size, path in references.items():

            def opened(name: ModuleName, size: Size = size) -> Graph:
                self.step(f"parity of the {name} at {words(size)}")
                return open_graph(name, size)

            device = GPU if of == "engine" and self.target.capability else CPU
            found, picture = load_reference(path).compare(opened, self.dtype("transformer"), device)
            for name, distance in found.items():
                gate = GATES[self.precisions[name]].check(f"{name} at {words(size)}", distance)
                modules[name, size] = {**distance.to_dict(), "gate": gate, "of": of}
            gate = IMAGE_GATES[self.spec.precision].check(f"picture at {words(size)}", picture)
            pictures[words(size)] = {**picture.to_dict(), "gate": gate, "of": of}
        return modules, pictures

    def open(self, artifact: Artifact) -> Graph:
        """Notes what the inspector tells of it."""
        graph = open_artifact(self.target.backend, self.target.vendor, self.folder, artifact, Scratch(GPU))
        if isinstance(graph, TensorRtGraph):
            self.layers[artifact.module, artifact.size] = {"layers_by_precision": graph.layers_by_precision()}
        return graph

    def batches(self, name: ModuleName, size: Size) -> tuple[int, ...]:
        """The buckets; for the autoencoder on a GPU only those whose activations leave the card room for the rest."""
        if name not in ("decoder", "encoder"):
            return self.spec.batches
        item = module_dtype(self.precisions[name]).itemsize
        return self.target.autoencoder_batches(self.spec.batches, size, self.checkpoint.autoencoder, item)

    def dtype(self, name: ModuleName) -> torch.dtype:
        if self.target.backend == "openvino":
            return torch.float32  # it rounds inside
        return module_dtype(self.precisions[name])

    def shape(self, size: Size) -> GraphShape:
        unit, config = self.checkpoint.autoencoder.compression, self.checkpoint.transformer
        tokens = self.checkpoint.settings.max_prompt_tokens
        return GraphShape(size[1] // unit, size[0] // unit, config.in_channels, unit, tokens, config.caption_channels)


def _reference_file(size: Size) -> str:
    return f"reference-{words(size)}.safetensors"


def _unchanged(out: Path, fingerprint: str) -> Manifest | None:
    """What lies in `out`, if it is whole and was built from exactly this."""
    try:
        manifest = read_manifest(out)
        if manifest.fingerprint != fingerprint:
            return None
        manifest.check_files(out)
    except ArtifactError:
        return None
    return manifest


def _device_name(target: Target, machine: Machine) -> str:
    if target.capability is None:
        return machine.cpu
    return machine.gpu if target.executable and machine.gpu else target.gpu
