"""torch-tensorrt: TensorRT engines made in the process that serves, for GPU hosts that want no build step.

One exported program per size and batch bucket, with fixed shapes, so that a CUDA graph has an execution context whose
shapes never change. A program is compiled when it first runs, saved, and loaded by later starts; each is held to its
module when it is loaded. Engines and timings that TensorRT makes on the way go to caches in the same folder. Types are
those of the module: TensorRT 11 has strong typing only. Source: torch_tensorrt 2.14, dynamo.compile, save, load, and
its page "Engine Caching", by which the engine cache works for refittable engines only (immutable_weights=False).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.adapters import (
    DecoderAdapter,
    EncoderAdapter,
    Graph,
    HeightWidth,
    ModuleGraph,
    TransformerAdapter,
    pad_batch,
)
from engines.backends.base import ModuleSpec
from engines.backends.parity import check_compiled
from engines.backends.quiet import quiet
from engines.checkpoints.home import expanded
from engines.device.hardware import dotted, this_machine
from engines.errors import BackendError, ParityError
from engines.types import powers_of_two, smallest_fitting

CACHE_BYTES = 20 * 2**30  # of engines; the oldest go first


def torch_tensorrt(module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """A drop-in for `module` whose first call at each bucket of a size in `spec.sizes` takes minutes, once per card.

    Other sizes run as they are. Programs lie in `spec.cache`. Raises BackendError where the package is missing, cannot
    be used, or the device is no GPU.
    """
    vendor = load_vendor()
    if spec.device.type != "cuda":
        raise BackendError(f"torch-tensorrt: needs an NVIDIA GPU, and the device is {spec.device}; use eager")
    return compile_with(vendor, module, spec)


def compile_with(vendor: Any, module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """`torch_tensorrt` with the package as an argument, on any device that it works on."""
    eager_graph = ModuleGraph(module)
    remedy = "give --cache DIR, or set HOME or XDG_CACHE_HOME to a folder that can be written"
    folder = (
        expanded(spec.cache, BackendError, remedy)
        / f"torch-tensorrt-{vendor.__version__}-{dotted(this_machine().capability)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{spec.name}-{_digest(module)}"
    compiled_graphs: Mapping[HeightWidth, Graph] = {
        side: CompiledPrograms(vendor, module, folder, f"{name}-{side[0]}x{side[1]}", spec) for side in spec.input_sizes
    }

    def graph_at(side: HeightWidth) -> Graph:
        return compiled_graphs.get(side, eager_graph)

    if spec.name in ("transformer", "controlled"):
        return TransformerAdapter(graph_at, spec.tokens)
    return DecoderAdapter(graph_at) if spec.name == "decoder" else EncoderAdapter(graph_at)


def load_vendor() -> Any:
    """The package. Raises BackendError; importing it fails in many ways where there is no driver."""
    try:
        with quiet():
            return import_module("torch_tensorrt")
    except ImportError as error:
        if error.name == "torch_tensorrt":
            reason = "the package is missing; pip install '.[torch-tensorrt]'"
        else:
            reason = f"the package cannot be used here: {_first_line(error)}"
        raise BackendError(f"torch-tensorrt: {reason}") from error
    except (RuntimeError, OSError, AssertionError) as error:
        raise BackendError(f"torch-tensorrt: the package cannot be used here: {_first_line(error)}") from error


class CompiledPrograms:
    """engines.backends.adapters.Graph of one module at one size: a compiled program per batch bucket."""

    def __init__(self, vendor: Any, module: nn.Module, folder: Path, name: str, spec: ModuleSpec):
        self._vendor, self._module, self._folder, self._name = vendor, module, folder, name
        self._device, self._dtype, self._buckets = spec.device, spec.dtype, powers_of_two(spec.max_batch)
        self._programs: dict[int, Callable[..., Any]] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        batch = next(iter(inputs.values())).shape[0]
        bucket = smallest_fitting(batch, self._buckets)
        bucket_inputs = {name: pad_batch(value, bucket) for name, value in inputs.items()}
        if bucket not in self._programs:
            self._programs[bucket] = self._program(bucket, bucket_inputs)
        return [output[:batch] for output in ModuleGraph(self._programs[bucket])(bucket_inputs)]

    def _program(self, bucket: int, inputs: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Raises BackendError where the program cannot be compiled, or one that was saved is damaged; ParityError where
        it is not what the module computes."""
        path = self._folder / f"{self._name}-b{bucket}.ep"
        if not path.exists():
            self._compile(path, inputs)
        try:
            with quiet():
                module: Callable[..., Any] = self._vendor.load(str(path)).module()
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"torch-tensorrt: {path} cannot be loaded ({_first_line(error)}); remove it") from error
        try:
            check_compiled(path.stem, self._module, ModuleGraph(module), inputs, self._dtype)
        except ParityError as error:
            raise ParityError(f"torch-tensorrt: {error}; remove {path}") from error
        return module

    def _compile(self, path: Path, inputs: Mapping[str, Tensor]) -> None:
        """Leaves the whole file or none."""
        # Export cannot trace inference tensors, which is what an engine's calls hold.
        with quiet(), torch.inference_mode(mode=False), torch.no_grad():
            examples = {name: value.clone() for name, value in inputs.items()}
            program = torch.export.export(self._module, (), examples)
            try:
                compiled = self._vendor.dynamo.compile(
                    program,
                    arg_inputs=(),
                    kwarg_inputs=examples,
                    device=self._device,
                    immutable_weights=False,
                    cache_built_engines=True,
                    reuse_cached_engines=True,
                    engine_cache_dir=str(self._folder / "engines"),
                    engine_cache_size=CACHE_BYTES,
                    timing_cache_path=str(self._folder / "timing.bin"),
                )
            except RuntimeError as error:
                raise BackendError(f"torch-tensorrt: {path.stem} cannot be compiled: {_first_line(error)}") from error
            unfinished = path.with_suffix(f".{os.getpid()}.ep")
            try:
                self._vendor.save(compiled, str(unfinished), kwarg_inputs=examples)
                unfinished.rename(path)
            finally:
                unfinished.unlink(missing_ok=True)


def _digest(module: nn.Module) -> str:
    """Of the weights and the kind of the module."""
    digest = hashlib.blake2b(repr(module).encode(), digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
