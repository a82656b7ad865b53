"""Runs a TensorRT engine on torch tensors, with a profile and a context for each batch bucket."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.backends.adapters import pad_batch
from engines.backends.tensorrt.log import Log, paused_garbage_collection
from engines.errors import ArtifactError, BackendError, OutOfMemoryError
from engines.types import smallest_fitting

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
    "INT64": torch.int64,
}
# The inspector has several names for one type.
_PRECISION_NAMES = {"Half": "FP16", "Float": "FP32", "BFloat16": "BF16", "E4M3": "FP8", "Float8": "FP8"}


class _JitCache:
    """File of the kernels that tensorrt_rtx compiles for this card; unused by tensorrt, whose engines hold kernels.

    tensorrt_rtx compiles kernels for a shape when it first runs. The default strategy compiles in the background and
    runs kernels for any shape meanwhile; a CUDA graph would capture those. EAGER waits.
    """

    def __init__(self, trt: Any, engine: Any, path: Path):
        self._engine, self._path = engine, path
        self._saved: set[int] = set()
        self._settings: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self._cache: Any = None
        self.loaded = False  # whether kernels came from the file
        if self._settings is not None and hasattr(self._settings, "create_runtime_cache"):
            self._cache = self._settings.create_runtime_cache()
            if path.exists():
                self._cache.deserialize(path.read_bytes())
                self.loaded = True
            self._settings.set_runtime_cache(self._cache)
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._settings.dynamic_shapes_kernel_specialization_strategy = eager

    def context(self, strategy: Any) -> Any:
        if self._cache is None:
            return self._engine.create_execution_context(strategy)
        self._settings.set_execution_context_allocation_strategy(strategy)
        return self._engine.create_execution_context(self._settings)

    def save(self, bucket: int) -> None:
        """Writes the compiled kernels after the first run of `bucket`; ignores a folder that cannot be written."""
        if self._cache is None or bucket in self._saved:
            return
        self._saved.add(bucket)
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_bytes(self._cache.serialize())


class Scratch:
    """Activation memory that all contexts of a device share, because they never run at the same time.

    Otherwise every captured graph would hold gigabytes of activations at 1024x1024. The block grows while engines are
    opened and keeps its address from the first context on. A later engine that needs more gets a new block.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._bytes = device, 0
        self._block: Tensor | None = None

    def reserve(self, size: int) -> None:
        self._bytes = max(self._bytes, size)

    def block(self, size: int) -> Tensor:
        """Returns at least `size` bytes; a context must keep the tensor while it uses the memory."""
        if self._block is None or self._block.numel() < size:
            self._block = torch.empty(max(self._bytes, size, 1), dtype=torch.uint8, device=self._device)
        return self._block


def _precision_of(text: str) -> str:
    """Returns the type in the inspector's description, such as "Row major linear FP16 format" or "Half"."""
    match = re.search(r"FP8|Float8|E4M3|BF16|BFloat16|FP16|Half|FP32|Float|Int8|UInt8|Int32|Int64|Bool", text)
    return _PRECISION_NAMES.get(match[0], match[0]) if match else "unknown"


class TensorRtGraph:
    """engines.backends.adapters.Graph of a built engine, run on device pointers and torch's current stream.

    Each bucket has its own execution context, created at first use. A CUDA graph keeps the addresses of the context
    that it captured, so each graph needs a copy of this with its own contexts. Larger batches run in pieces.
    jit_cache: file for the kernels that tensorrt_rtx compiles. scratch: shared by the engines of the device.

    Raises ArtifactError if TensorRT rejects the file, OutOfMemoryError if a context does not fit.
    """

    def __init__(
        self,
        trt: Any,
        plan: Path,
        buckets: Sequence[int],
        jit_cache: Path,
        scratch: Scratch,
        stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream,
    ):
        self._trt, self._buckets, self._stream, self._scratch = trt, tuple(buckets), stream, scratch
        self._log = Log()
        with paused_garbage_collection():
            self._runtime = trt.Runtime(self._log.attach(trt))
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"engine: {plan.name}: {trt.__name__} refuses it: {self._log.first_error()}")
        self._name = plan.stem
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in tensors}
        self._inputs = [name for name in tensors if modes[name] == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in tensors if modes[name] == trt.TensorIOMode.OUTPUT]
        self._types = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in tensors}
        self._jit = _JitCache(trt, self._engine, jit_cache)
        self._scratch.reserve(self._engine.device_memory_size_v2)
        self._contexts: dict[int, tuple[Any, Tensor]] = {}  # with their activation memory

    @property
    def from_cache(self) -> tuple[int, ...]:
        """The buckets whose kernels may come from an earlier process's file."""
        return self._buckets if self._jit.loaded else ()

    def new_context(self) -> "TensorRtGraph":
        """Returns the same engine with its own contexts."""
        other = object.__new__(TensorRtGraph)
        other.__dict__.update(self.__dict__)
        other._contexts = {}
        return other

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        batch, largest = next(iter(inputs.values())).shape[0], self._buckets[-1]
        if batch <= largest:
            return self._run(inputs, batch)
        pieces = [
            self._run(
                {name: value[start : start + largest] for name, value in inputs.items()}, min(largest, batch - start)
            )
            for start in range(0, batch, largest)
        ]
        return [torch.cat(outputs) for outputs in zip(*pieces, strict=True)]

    def layers_by_precision(self) -> dict[str, int]:
        """Counts by type the layers that read or write it, from the engine inspector; shows if fp8 kernels run.

        A product that reads fp8 mostly writes fp16. Where the tensors do not show fp8, the kernel's name does.
        """
        inspector = self._engine.create_engine_inspector()
        report = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers = json.loads(report).get("Layers", [])
        counts: dict[str, int] = {}
        for layer in (entry for entry in layers if isinstance(entry, dict)):  # other entries are only names
            tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
            precisions = {_precision_of(tensor.get("Format/Datatype", "")) for tensor in tensors}
            if re.search("e4m3|fp8", str(layer.get("TacticName")), re.IGNORECASE):
                precisions.add("FP8")
            for precision in precisions:
                counts[precision] = counts.get(precision, 0) + 1
        return counts

    def _context(self, bucket: int) -> Any:
        if bucket not in self._contexts:
            context = self._jit.context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise OutOfMemoryError(f"engine: {self._name}: no memory for a context; {self._log.first_error()}")
            if not context.set_optimization_profile_async(self._buckets.index(bucket), self._stream()):
                raise BackendError(f"{self._name}: no profile for a batch of {bucket}: {self._log.first_error()}")
            block = self._scratch.block(self._engine.device_memory_size_v2)
            context.set_device_memory(block.data_ptr(), block.numel())
            self._contexts[bucket] = context, block
        return self._contexts[bucket][0]

    def _run(self, inputs: Mapping[str, Tensor], batch: int) -> list[Tensor]:
        bucket = smallest_fitting(batch, self._buckets)
        context = self._context(bucket)
        bucket_inputs = {name: pad_batch(inputs[name].to(self._types[name]), bucket) for name in self._inputs}
        for name, value in bucket_inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise BackendError(f"{self._name}: {name} of shape {list(value.shape)} is not what it was built for")
            context.set_tensor_address(name, value.data_ptr())
        device = next(iter(bucket_inputs.values())).device
        outputs = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._types[name], device=device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(self._stream()):
            raise BackendError(f"{self._name}: {self._trt.__name__} failed: {self._log.first_error()}")
        self._jit.save(bucket)
        return [value[:batch] for value in outputs.values()]
