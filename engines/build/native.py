"""Builds a native engine: our kernels compiled for a GPU, and weights laid out for them.

The gates hold the kernels' references on the CPU, in the served precision. A server compares each kernel with its
reference on the GPU when it starts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engines.artifacts.manifest import Artifact, FileRecord
from engines.artifacts.reference import Reference
from engines.backends.adapters import Graph
from engines.backends.base import ModuleName
from engines.backends.parity import GATES, IMAGE_GATES, INT8_GATE, Gate, difference
from engines.build.spec import BuildSpec, Size, size_label
from engines.build.targets import Target
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.fingerprint import decoder_stamps
from engines.checkpoints.weights import file_stamps
from engines.pipeline.calibration import PROMPTS
from engines.pipeline.text_stage import load_text_stage

# engines.artifacts.native needs Triton, which is optional on a CPU, so functions import it.

NATIVE_STEPS = 5  # of a build at any number of sizes: text, modules, scales, files, kernels
CPU = torch.device("cpu")
# Of the text encoder against PyTorch's module in bf16: two roundings apart, or with an MLP's weights in 8 bits.
_TEXT_GATES = {"bf16": Gate(sqnr_db=25), "fp8": Gate(sqnr_db=20)}
_OF = "kernels' references on a CPU"


@dataclass(frozen=True)
class BuildOutput:
    """The artifacts of a vendor's build for the manifest. image_parity: "WxH" -> parity of the decoded image."""

    artifacts: tuple[Artifact, ...]
    image_parity: Mapping[str, Mapping[str, object]]
    shared: tuple[FileRecord, ...] = ()


class BuildContext(Protocol):
    """A build in progress (engines.build.builder)."""

    spec: BuildSpec
    checkpoint: Checkpoint
    fast: Checkpoint | None
    target: Target
    folder: Path

    @property
    def modules(self) -> Sequence[ModuleName]: ...

    def step(self, text: str) -> None: ...


def native_versions() -> dict[str, str]:
    from engines.artifacts.native.loading import package_versions

    return package_versions()


@torch.inference_mode()
def native_output(build: BuildContext, references: Mapping[Size, Path]) -> BuildOutput:
    """Writes all but the manifest into the build's folder. Raises BuildError, ParityError."""
    from engines.artifacts.native.compiling import CompileRequest, compile_kernels
    from engines.artifacts.native.loading import KERNELS, NativeInfo, code_digest
    from engines.artifacts.native.skeleton import DTYPE, modules_of, skeleton
    from engines.artifacts.native.storages import save
    from engines.kernels.launch_code import check_c
    from engines.kernels.op import Ops
    from engines.pipeline.native import NativeBackend, Ranges

    check_c()  # fails now, not after an hour
    spec, checkpoint, fast, folder = build.spec, build.checkpoint, build.fast, build.folder
    started, kernels = time.perf_counter(), NativeBackend(Ops(None), checkpoint.autoencoder)
    files: dict[str, tuple[FileRecord, ...]] = {}
    ranges: Ranges = {}

    def save_component(name: str, module: object) -> None:
        blank = skeleton(checkpoint, NativeBackend(kernels.ops, checkpoint.autoencoder), ranges, fast).memory[name]
        files[name] = tuple(FileRecord.of(path) for path in save({name: blank}, {name: module}, folder, name))

    build.step("text encoder")
    stage = load_text_stage(checkpoint, DTYPE, CPU)
    prompts = [stage.tokenizer.encode(prompt).tokens for prompt in PROMPTS[:2]]
    expected = torch.cat(stage.encoder.encode(prompts)).float()
    stage = kernels.text(stage)
    build.step("weights of the transformer and the autoencoder")
    modules = modules_of(checkpoint, kernels, CPU, fast)
    if spec.precision == "fp8":
        build.step("scales of 8 bits")
        kernels.to_fp8(checkpoint, stage, checkpoint.settings.default_size, CPU)
        ranges = kernels.ranges
    distance = difference(expected, torch.cat(stage.encoder.encode(prompts)).float())
    gate = _TEXT_GATES[spec.precision].check("text encoder", distance)
    text = {**distance.to_dict(), "gate": gate, "of": _OF}
    save_component("text", stage.encoder)
    del stage
    precisions = dict.fromkeys(build.modules, "bf16") | dict.fromkeys(ranges, "fp8")
    parity, image_parity = _parity(build, modules, references, precisions)
    build.step("files of weights")
    for name, module in modules.items():
        save_component(name, module)
    del modules
    build.step(f"kernels for {build.target.gpu}")
    assert build.target.capability is not None
    cache = folder / KERNELS
    unfit = compile_kernels(
        CompileRequest(
            *(spec.model, spec.decoder, spec.sizes, spec.batches, ranges),
            *(build.target.capability, str(cache.absolute()), spec.fast_decoder),
        ),
        spec.jobs,
    )
    stamps = file_stamps(checkpoint.weights), () if fast is None else decoder_stamps(fast)
    info = NativeInfo(code_digest(), stamps[0], ranges, text, stamps[1]).write(folder)
    compiled = (FileRecord.of(path, folder) for path in sorted(cache.rglob("*")) if path.is_file())
    seconds = round(time.perf_counter() - started, 1)
    details: dict[str, dict[str, object]]
    details = {name: {"reason": kernels.reasons[name]} for name in build.modules if name in kernels.reasons}
    of_transformer = details.setdefault("transformer", {})
    if unfit:
        of_transformer["no_room_for"] = ", ".join(sorted(unfit))
    if kernels.product_sqnr_db:
        of_transformer["sqnr_db_alone"] = {**kernels.product_sqnr_db, "text": round(distance.sqnr_db, 1)}
        if "fp8" in kernels.reasons:
            of_transformer["fp8"] = kernels.reasons["fp8"]
    artifacts = tuple(
        Artifact(
            *(name, size, precisions[name], spec.batches, seconds, files[name]),
            parity[name, size],
            details.get(name, {}),
        )
        for name in build.modules
        for size in spec.sizes
    )
    return BuildOutput(artifacts, image_parity, (*files["text"], FileRecord.of(info), *compiled))


def _parity(
    build: BuildContext,
    modules: Mapping[ModuleName, Callable[..., Any]],
    references: Mapping[Size, Path],
    precisions: Mapping[str, str],
) -> tuple[dict[tuple[ModuleName, Size], dict[str, object]], dict[str, dict[str, object]]]:
    """Returns distances and passed gates of modules and of images. Raises ParityError."""
    parity: dict[tuple[ModuleName, Size], dict[str, object]] = {}
    image_parity: dict[str, dict[str, object]] = {}
    for size, path in references.items():

        def opened(name: ModuleName, size: Size = size) -> Graph:
            build.step(f"parity of the {name} at {size_label(size)}")
            return _RowByRow(modules[name])

        distances, image = Reference.load(path).compare(opened, torch.bfloat16, fast=build.fast is not None)
        for name, distance in distances.items():
            gate = INT8_GATE if (name, precisions[name]) == ("decoder", "fp8") else GATES[precisions[name]]
            passed = gate.check(f"{name} at {size_label(size)}", distance)
            parity[name, size] = {**distance.to_dict(), "gate": passed, "of": _OF}
        passed = IMAGE_GATES[build.spec.precision].check(f"image at {size_label(size)}", image)
        image_parity[size_label(size)] = {**image.to_dict(), "gate": passed, "of": _OF}
    return parity, image_parity


class _RowByRow:
    """A Graph that runs a module one job at a time, as one image at full size takes gigabytes."""

    def __init__(self, module: Callable[..., Any]):
        self._module = module

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        rows = []
        for row in range(next(iter(inputs.values())).shape[0]):
            outputs = self._module(**{name: value[row : row + 1] for name, value in inputs.items()})
            rows.append(outputs if isinstance(outputs, tuple) else (outputs,))
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
