"""A native engine from a checkpoint: our own kernels compiled for a card, weights laid out for them, held to the gates.

Parity is that of the kernels' references on the CPU, in the precision served; each kernel is compared with its
reference on the card when a server starts.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engines.artifacts.manifest import Artifact, FileRecord
from engines.artifacts.reference import MODULES, load_reference
from engines.backends.adapters import Graph
from engines.backends.base import ModuleName
from engines.backends.parity import GATES, IMAGE_GATES, INT8_GATE, Gate, difference
from engines.build.spec import BuildSpec, Size, words
from engines.build.targets import Target
from engines.checkpoints.checkpoint import Checkpoint
from engines.errors import BuildError
from engines.pipeline.calibration import PROMPTS
from engines.pipeline.text_stage import load_text_stage

# engines.artifacts.native needs Triton, which a CPU's environment may not have, so it is imported inside functions.

NATIVE_STEPS = 5  # of a build, whatever its sizes: text, modules, scales, files, kernels
CPU = torch.device("cpu")
# Of the text encoder against PyTorch's module, both in bf16: two roundings apart.
_TEXT_GATE = Gate(sqnr_db=25)
_OF = "kernels' references on a CPU"


@dataclass(frozen=True)
class Pieces:
    """What a vendor's build gives to the manifest."""

    artifacts: tuple[Artifact, ...]
    pictures: Mapping[str, Mapping[str, object]]
    shared: tuple[FileRecord, ...] = ()


class Work(Protocol):
    """A build under way (engines.build.builder)."""

    spec: BuildSpec
    checkpoint: Checkpoint
    target: Target
    folder: Path

    def step(self, text: str) -> None: ...


def native_versions() -> dict[str, str]:
    from engines.artifacts.native.loading import package_versions

    return package_versions()


@torch.inference_mode()
def native_pieces(work: Work, references: Mapping[Size, Path]) -> Pieces:
    """Writes all but the manifest into the work's folder. Raises BuildError, ParityError."""
    from engines.artifacts.native.compiling import Request, compile_kernels
    from engines.artifacts.native.loading import KERNELS, About, code, stamps
    from engines.artifacts.native.offline import c_compiler
    from engines.artifacts.native.skeleton import DTYPE, modules_of, skeleton
    from engines.artifacts.native.storages import save
    from engines.backends.cuda.decoder import CudaDecoder, unsupported_decoder
    from engines.kernels.op import Ops
    from engines.pipeline.native import Native

    c_compiler()  # missed now, not after an hour
    spec, checkpoint, folder = work.spec, work.checkpoint, work.folder
    against = unsupported_decoder(checkpoint.autoencoder)
    if spec.precision == "fp8" and against is not None:
        raise BuildError(f"precision: fp8 needs a decoder that our kernels can run: {against}; use bf16")
    started, kernels = time.perf_counter(), Native(Ops(None), checkpoint.autoencoder)
    files: dict[str, tuple[FileRecord, ...]] = {}
    ranges: list[list[float]] = []

    def store(name: str, made: object) -> None:
        blank = skeleton(checkpoint, Native(kernels.ops, checkpoint.autoencoder), ranges).memory[name]
        files[name] = tuple(FileRecord.of(path) for path in save({name: blank}, {name: made}, folder, name))

    work.step("text encoder")
    stage = load_text_stage(checkpoint, DTYPE, CPU)
    prompts = [stage.tokenizer.encode(prompt).tokens for prompt in PROMPTS[:2]]
    expected = torch.cat(stage.encoder.encode(prompts)).float()
    stage = kernels.text(stage)
    found = difference(expected, torch.cat(stage.encoder.encode(prompts)).float())
    text = {**found.to_dict(), "gate": _TEXT_GATE.check("text encoder", found), "of": _OF}
    store("text", stage.encoder)
    work.step("weights of the transformer and the autoencoder")
    modules = modules_of(checkpoint, kernels, CPU)
    if spec.precision == "fp8":
        work.step("scales of 8 bits")
        kernels.to_fp8(checkpoint, stage, checkpoint.settings.default_size, CPU)
        decoder = modules["decoder"]
        assert isinstance(decoder, CudaDecoder)
        ranges = decoder.ranges
    del stage
    parity, pictures = _parity(work, modules, references)
    work.step("files of weights")
    for name, module in modules.items():
        store(name, module)
    del modules
    work.step(f"kernels for {work.target.gpu}")
    assert work.target.capability is not None
    cache = folder / KERNELS
    no_room = compile_kernels(
        Request(
            spec.model, spec.decoder, spec.sizes, spec.batches, ranges, work.target.capability, str(cache.absolute())
        ),
        spec.jobs,
    )
    about = About(code(), stamps(checkpoint.weights), ranges, text).write(folder)
    compiled = (FileRecord.of(path, folder) for path in sorted(cache.rglob("*")) if path.is_file())
    seconds = round(time.perf_counter() - started, 1)
    details = {name: {"reason": kernels.reasons[name]} for name in MODULES if name in kernels.reasons}
    if no_room:
        details["transformer"] = {**details.get("transformer", {}), "no_room_for": ", ".join(sorted(no_room))}
    artifacts = tuple(
        Artifact(
            *(name, size, _precision(spec, name), spec.batches, seconds, files[name]),
            parity[name, size],
            details.get(name, {}),
        )
        for name in MODULES
        for size in spec.sizes
    )
    return Pieces(artifacts, pictures, (*files["text"], FileRecord.of(about), *compiled))


def _parity(
    work: Work, modules: Mapping[ModuleName, Callable[..., Any]], references: Mapping[Size, Path]
) -> tuple[dict[tuple[ModuleName, Size], dict[str, object]], dict[str, dict[str, object]]]:
    """Distances and kept gates, of modules and of pictures. Raises ParityError."""
    found: dict[tuple[ModuleName, Size], dict[str, object]] = {}
    pictures: dict[str, dict[str, object]] = {}
    for size, path in references.items():

        def opened(name: ModuleName, size: Size = size) -> Graph:
            work.step(f"parity of the {name} at {words(size)}")
            return _RowByRow(modules[name])

        distances, picture = load_reference(path).compare(opened, torch.bfloat16)
        for name, distance in distances.items():
            gate = INT8_GATE if _precision(work.spec, name) == "fp8" else GATES["bf16"]
            kept = gate.check(f"{name} at {words(size)}", distance)
            found[name, size] = {**distance.to_dict(), "gate": kept, "of": _OF}
        kept = IMAGE_GATES[work.spec.precision].check(f"picture at {words(size)}", picture)
        pictures[words(size)] = {**picture.to_dict(), "gate": kept, "of": _OF}
    return found, pictures


class _RowByRow:
    """A Graph over a module that takes one job at a time, as pictures at full size take gigabytes each."""

    def __init__(self, module: Callable[..., Any]):
        self._module = module

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        made = []
        for row in range(next(iter(inputs.values())).shape[0]):
            outputs = self._module(**{name: value[row : row + 1] for name, value in inputs.items()})
            made.append(outputs if isinstance(outputs, tuple) else (outputs,))
        return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _precision(spec: BuildSpec, name: ModuleName) -> str:
    """With fp8 it is the decoder's convolutions that take it."""
    return "fp8" if spec.precision == "fp8" and name == "decoder" else "bf16"
