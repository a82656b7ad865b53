"""Builds a folder of engines from a checkpoint: reference, export, compilation, parity gates, manifest.

The fp32 reference of every size comes first, then each module in its own precision: no two large modules are in memory
together. A failed build leaves nothing behind. A build without changed inputs does nothing.
"""

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from engines.artifacts.loading import open_artifact
from engines.artifacts.manifest import NATIVE, Artifact, FileRecord, Manifest, read_manifest
from engines.artifacts.precision import module_dtype, module_precision
from engines.artifacts.reference import Reference, built_modules
from engines.backends.adapters import Graph
from engines.backends.base import ModuleName
from engines.backends.parity import GATES, IMAGE_GATES
from engines.backends.tensorrt.runtime import Scratch, TensorRtGraph
from engines.build.atomic_directory import atomic_directory
from engines.build.compilation import compile_graph
from engines.build.example_inputs import StaticShape, example_inputs
from engines.build.fp8_coverage import fp8_share
from engines.build.native import NATIVE_STEPS, BuildOutput, native_output, native_versions
from engines.build.onnx_export import export_onnx, onnx_files
from engines.build.onnx_runner import OnnxGraph
from engines.build.quantization import cast_to, onnx_translations, quantize
from engines.build.references import reference_file, write_references
from engines.build.spec import BuildSpec, Size, fingerprint_of, size_label, with_checkpoint_defaults
from engines.build.targets import Target, resolve
from engines.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_fast_decoder
from engines.checkpoints.fingerprint import decoder_sha256
from engines.checkpoints.lora import with_adapters
from engines.device.hardware import Machine, capability_text, package_versions, this_machine
from engines.errors import ArtifactError, BuildError
from engines.models.folding import fold
from engines.models.pixels import PixelEncoder
from engines.pipeline.calibration import calibration_prompts

Progress = Callable[[int, int, str], None]  # steps done, number of steps, text of the next step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TIMING = "timing.cache"  # TensorRT's; a build takes it over from the engines that it replaces
_FP16_LARGEST = 65504
_FP8_SHARE = 0.85
_VERSIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "modelopt", "openvino", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class BuildResult:
    """The manifest; `changed` is False if the engines existed."""

    manifest: Manifest
    changed: bool


def no_progress(done: int, total: int, text: str) -> None:
    """A Progress that shows nothing."""


def build(spec: BuildSpec, progress: Progress = no_progress) -> BuildResult:
    """Builds the engines of `spec`, or returns the manifest of existing ones with equal inputs.

    Raises BuildError (refused, failed or disk full), ParityError (too far from the reference), CheckpointError,
    BackendError. An error leaves nothing behind and keeps the engines in `out`.
    """
    machine = this_machine()
    target = resolve(spec.gpu, spec.precision, machine, vendor=spec.vendor)
    checkpoint = open_checkpoint(spec.model, spec.decoder)
    spec = with_checkpoint_defaults(spec, checkpoint)
    fast = None if spec.fast_decoder is None else open_fast_decoder(checkpoint, spec.fast_decoder)
    checkpoint, _ = with_adapters(checkpoint, spec.lora, {})
    sha256, fast_sha256 = checkpoint.weights.sha256(), None if fast is None else decoder_sha256(fast)
    versions = package_versions(*_VERSIONS)
    if target.vendor == NATIVE:
        spec, versions = replace(spec, vendor=NATIVE), {**versions, **native_versions()}
    fingerprint = fingerprint_of(spec, target, (sha256, fast_sha256), versions)
    present = _unchanged(spec.out, fingerprint)
    if present is not None:
        return BuildResult(present, changed=False)
    with atomic_directory(spec.out) as folder:
        started = time.perf_counter()
        if (spec.out / TIMING).is_file():
            shutil.copy(spec.out / TIMING, folder)
        run = _Build(spec, checkpoint, target, folder, progress, fast)
        references = run.references()
        output = native_output(run, references) if target.vendor == NATIVE else run.output(references)
        manifest = Manifest(
            checkpoint=spec.model,
            checkpoint_sha256=sha256,
            decoder=spec.decoder,
            gpu=spec.gpu,
            device=_device_name(target, machine),
            compute_capability=capability_text(target.capability) if target.capability else None,
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
            pictures=output.image_parity,
            references={size_label(size): FileRecord.of(folder / reference_file(size)) for size in spec.sizes},
            artifacts=output.artifacts,
            shared=output.shared,
            adapters=tuple((option.name, option.scale or 0.0) for option in spec.lora),
            fast_decoder=spec.fast_decoder,
            fast_decoder_sha256=fast_sha256,
        )
        manifest.write(folder)
    return BuildResult(manifest, changed=True)


Key = tuple[ModuleName, Size]


@dataclass(frozen=True)
class _Graph:
    path: Path
    seconds: float
    fp8_share: float | None = None  # of the matrix arithmetic


@dataclass
class _Build:
    """One build in progress, in its temporary folder."""

    spec: BuildSpec
    checkpoint: Checkpoint
    target: Target
    folder: Path
    progress: Progress
    fast: Checkpoint | None = None  # with the decoder of --fast-decoder
    done: int = 0
    precisions: dict[ModuleName, str] = field(default_factory=dict)  # decided by the reference
    reasons: dict[ModuleName, str] = field(default_factory=dict)  # for a precision other than the requested one
    layers: dict[Key, dict[str, object]] = field(default_factory=dict)  # from TensorRT's inspector

    @property
    def modules(self) -> tuple[ModuleName, ...]:
        return built_modules(fast=self.fast is not None)

    @property
    def total(self) -> int:
        """Number of steps. A size has 2 or 3 references, then export, compilation, parity of each module.

        Native: parity.
        """
        references = 2 if self.fast is None else 3
        if self.target.vendor == NATIVE:
            return NATIVE_STEPS + len(self.spec.sizes) * (references + len(self.modules))
        return len(self.spec.sizes) * (references + 3 * len(self.modules))

    def step(self, text: str) -> None:
        self.progress(self.done, self.total, text)
        self.done += 1

    def references(self) -> dict[Size, Path]:
        """Writes the fp32 reference of each size and decides the precision of each module. Returns the paths."""
        return write_references(
            *(self.checkpoint, self.fast, {size: self.shape(size) for size in self.spec.sizes}),
            *(min(2, max(self.spec.batches)), self.folder),
            step=self.step,
            measured=self.choose_precision,
        )

    def output(self, references: Mapping[Size, Path]) -> BuildOutput:
        """Returns the artifacts of a vendor that compiles ONNX graphs."""
        graphs = self.graphs()
        if not self.target.executable:
            parity, image_parity = self.parity(references, lambda *key: OnnxGraph(graphs[key].path), "graph")
        compiled = self.compiled(graphs)
        if self.target.executable:
            parity, image_parity = self.parity(references, lambda *key: self.open(compiled[key]), "engine")
        for key, artifact in compiled.items():
            details = {**artifact.details, **self.layers.get(key, {})}
            compiled[key] = replace(artifact, parity=parity[key], details=details)
        return BuildOutput(tuple(compiled.values()), image_parity)

    def choose_precision(self, name: ModuleName, peaks: Mapping[str, float]) -> None:
        """Sets the precision of one module: the requested one, or bf16 for an autoencoder that overflows fp16.

        Upstream advises bf16 or fp32 for the autoencoder; published ones overflow (diffusers issues 9982, 10241).
        Raises BuildError if the transformer overflows.
        """
        if self.target.vendor == NATIVE:
            return  # always bf16, which no value of a checkpoint overflows
        precision = module_precision(self.spec.precision, name)
        part, peak = max(peaks.items(), key=lambda pair: pair[1])
        if module_dtype(precision) == torch.float16 and peak * 2 > _FP16_LARGEST:
            reason = f"{name}.{part} reaches {peak:.0f} on real prompts, and fp16 holds {_FP16_LARGEST}"
            if name == "transformer":
                raise BuildError(f"precision: {reason}; build with --precision bf16")
            self.reasons[name] = reason
            precision = "bf16"
        self.precisions[name] = precision

    def graphs(self) -> dict[Key, _Graph]:
        """Exports every module at every size to ONNX; loads each module once."""
        graphs: dict[Key, _Graph] = {}
        for name in self.modules:
            module = self.module(name)
            for size in self.spec.sizes:
                self.step(f"export of the {name} at {size_label(size)}")
                graphs[name, size] = self.export(module, name, size)
            del module
            gc.collect()
        return graphs

    def export(self, module: nn.Module, name: ModuleName, size: Size) -> _Graph:
        """Exports one module at one size. Raises BuildError if fp8 covers too little of the arithmetic."""
        started = time.perf_counter()
        path = self.folder / f"{name}-{size_label(size)}.onnx"
        inputs = example_inputs(name, self.shape(size), 2, self.dtype(name))
        if self.precisions[name] != "fp8":
            export_onnx(module, name, inputs, path)
            return _Graph(path, time.perf_counter() - started)
        with onnx_translations() as translations:
            export_onnx(module, name, inputs, path, translations)
        share = fp8_share(path)
        if share < _FP8_SHARE:
            raise BuildError(
                f"{path.stem}: fp8 reaches {share:.0%} of the matrix arithmetic, {_FP8_SHARE:.0%} is needed"
            )
        return _Graph(path, time.perf_counter() - started, share)

    def module(self, name: ModuleName) -> nn.Module:
        """Returns one module in its chosen precision."""
        dtype = self.dtype(name)
        if name == "transformer" and self.precisions[name] == "fp8":
            self.progress(self.done, self.total, "calibration of the transformer")
            exact = self.checkpoint.load_transformer(torch.float32, CPU)
            sides = [(shape.height, shape.width) for shape in map(self.shape, self.spec.sizes)]
            texts, channels = calibration_prompts(self.checkpoint), self.checkpoint.transformer.in_channels
            return cast_to(quantize(exact, texts, sides, self.spec.steps, channels), dtype)
        if name == "transformer":
            return self.checkpoint.load_transformer(dtype, CPU)
        if name == "encoder":
            return PixelEncoder(self.checkpoint.load_autoencoder(dtype, CPU))
        owner = self.fast if self.fast is not None and name == "fast_decoder" else self.checkpoint
        decoder = owner.load_pixel_decoder(None, dtype, CPU)
        if decoder.dcae is not None:
            fold(decoder.dcae)
        return decoder

    def compiled(self, graphs: Mapping[Key, _Graph]) -> dict[Key, Artifact]:
        """Compiles the graphs and removes them. Returns the artifacts, without their parity."""
        artifacts: dict[Key, Artifact] = {}
        for (name, size), graph in graphs.items():
            self.step(f"compilation of the {name} at {size_label(size)}")
            started = time.perf_counter()
            batches = self.batches(name, size)
            compiled, details = compile_graph(self.target, graph.path, batches, self.folder / TIMING)
            for path in onnx_files(graph.path):
                path.unlink()
            seconds = round(graph.seconds + time.perf_counter() - started, 1)
            files = tuple(FileRecord.of(path) for path in compiled)
            share = {} if graph.fp8_share is None else {"fp8_share": round(graph.fp8_share, 4)}
            details = {**details, **share, **({"reason": self.reasons[name]} if name in self.reasons else {})}
            precision = self.precisions[name]
            artifacts[name, size] = Artifact(name, size, precision, batches, seconds, files, {}, details)
        return artifacts

    def parity(
        self, references: Mapping[Size, Path], open_graph: Callable[[ModuleName, Size], Graph], of: str
    ) -> tuple[dict[Key, dict[str, object]], dict[str, dict[str, object]]]:
        """Returns distances and passed gates of the modules and of the images. Raises ParityError."""
        modules: dict[Key, dict[str, object]] = {}
        image_parity: dict[str, dict[str, object]] = {}
        for size, path in references.items():

            def opened(name: ModuleName, size: Size = size) -> Graph:
                self.step(f"parity of the {name} at {size_label(size)}")
                return open_graph(name, size)

            device = GPU if of == "engine" and self.target.capability else CPU
            reference, dtype = Reference.load(path), self.dtype("transformer")
            distances, image = reference.compare(opened, dtype, device, fast=self.fast is not None)
            for name, distance in distances.items():
                gate = GATES[self.precisions[name]].check(f"{name} at {size_label(size)}", distance)
                modules[name, size] = {**distance.to_dict(), "gate": gate, "of": of}
            gate = IMAGE_GATES[self.spec.precision].check(f"image at {size_label(size)}", image)
            image_parity[size_label(size)] = {**image.to_dict(), "gate": gate, "of": of}
        return modules, image_parity

    def open(self, artifact: Artifact) -> Graph:
        """Opens an artifact and stores the layers that TensorRT's inspector reports."""
        graph = open_artifact(self.target.backend, self.target.vendor, self.folder, artifact, Scratch(GPU))
        if isinstance(graph, TensorRtGraph):
            self.layers[artifact.module, artifact.size] = {"layers_by_precision": graph.layers_by_precision()}
        return graph

    def batches(self, name: ModuleName, size: Size) -> tuple[int, ...]:
        """Returns the buckets; for the autoencoder on a GPU only those whose activations fit beside the rest."""
        if name == "transformer":
            return self.spec.batches
        item = module_dtype(self.precisions[name]).itemsize
        return self.target.autoencoder_batches(self.spec.batches, size, self.checkpoint.autoencoder, item)

    def dtype(self, name: ModuleName) -> torch.dtype:
        if self.target.backend == "openvino":
            return torch.float32  # OpenVINO rounds inside
        return module_dtype(self.precisions[name])

    def shape(self, size: Size) -> StaticShape:
        unit, config = self.checkpoint.autoencoder.compression, self.checkpoint.transformer
        tokens = self.checkpoint.settings.max_prompt_tokens
        return StaticShape(size[1] // unit, size[0] // unit, config.in_channels, unit, tokens, config.caption_channels)


def _unchanged(out: Path, fingerprint: str) -> Manifest | None:
    """Returns the manifest in `out` if its files are intact and it has this fingerprint."""
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
