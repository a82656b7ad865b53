"""Backend torch-tensorrt: compiles TensorRT engines in the serving process, without a build step.

Each size and batch bucket has one exported program of fixed shapes, so that the execution context of a CUDA graph never
changes shape. A program is compiled at its first run, saved, and loaded by later starts; each loaded program is
compared with its module. TensorRT's engine and timing caches are in the same folder. Types are those of the module:
TensorRT 11 has strong typing only. Source: torch_tensorrt 2.14, dynamo.compile, save, load, and its page "Engine
Caching", by which the engine cache needs refittable engines (immutable_weights=False).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.adapters import Graph, HeightWidth, ModuleGraph, adapter_for, pad_batch
from engines.backends.base import ModuleSpec
from engines.backends.parity import check_compiled
from engines.backends.quiet import quiet
from engines.checkpoints.home import expand_home
from engines.device.hardware import capability_text, this_machine
from engines.errors import BackendError, ParityError
from engines.types import powers_of_two, smallest_fitting

CACHE_BYTES = 20 * 2**30  # size of the engine cache; the oldest engines are removed first


def torch_tensorrt(module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """Returns a replacement for `module`; its first call at each bucket and size takes minutes, once per card.

    Sizes outside of `spec.sizes` run eagerly. Programs are saved in `spec.cache`. Raises BackendError if the package is
    missing or unusable, or the device is not a GPU.
    """
    vendor = load_vendor()
    if spec.device.type != "cuda":
        raise BackendError(f"torch-tensorrt: needs an NVIDIA GPU, and the device is {spec.device}; use eager")
    return compile_with(vendor, module, spec)


def compile_with(vendor: Any, module: nn.Module, spec: ModuleSpec) -> Callable[..., Any]:
    """Does what `torch_tensorrt` does, with the package as an argument and on any device."""
    eager_graph = ModuleGraph(module)
    remedy = "give --cache DIR, or set HOME or XDG_CACHE_HOME to a folder that can be written"
    folder = (
        expand_home(spec.cache, BackendError, remedy)
        / f"torch-tensorrt-{vendor.__version__}-{capability_text(this_machine().capability)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{spec.name}-{_digest(module)}"
    compiled_graphs: Mapping[HeightWidth, Graph] = {
        side: CompiledPrograms(vendor, module, folder, f"{name}-{side[0]}x{side[1]}", spec) for side in spec.input_sizes
    }

    def graph_at(side: HeightWidth) -> Graph:
        return compiled_graphs.get(side, eager_graph)

    return adapter_for(spec.name, graph_at, spec.tokens)


def load_vendor() -> Any:
    """Imports the package. Raises BackendError; without a driver the import fails in many ways."""
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
    """engines.backends.adapters.Graph of one module at one size, with a compiled program per batch bucket."""

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
        """Loads the program of `bucket`, compiling it first if its file is missing.

        Raises BackendError if it cannot be compiled or loaded, ParityError if it differs from the module.
        """
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
        """Compiles the module and writes the complete file, or none."""
        # An engine's calls hold inference tensors, which export cannot trace.
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
    """Returns a digest of the module's structure and weights."""
    digest = hashlib.blake2b(repr(module).encode(), digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
