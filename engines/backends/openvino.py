"""Exported graphs on the CPU through OpenVINO: one compiled model per batch bucket, cached on disk.

f32 computes as the graph says; with bf16 OpenVINO rounds factors to bf16, on CPUs that have it. A model with a fixed
batch runs up to twice as fast as one with an open batch, hence one per bucket.

OpenVINO's cache key holds the model (with weights and batch) and the CPU's name, but not precision, threads or CPU
instructions (docs/understand/decisions/0011-compiled-models-on-disk.md). So each combination of these has a folder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends.adapters import pad_batch
from engines.device.hardware import cpu_flags
from engines.errors import ArtifactError, BackendError
from engines.types import smallest_fitting

CpuPrecision = Literal["fp32", "bf16"]
_HINT = {"fp32": "f32", "bf16": "bf16"}


def convert(onnx_path: Path, target: Path) -> list[Path]:
    """Writes the graph in OpenVINO's format (`target`.xml and .bin) with unchanged weights; returns both files."""
    vendor = _openvino()
    xml = target.with_suffix(".xml")
    vendor.save_model(vendor.Core().read_model(onnx_path), xml, compress_to_fp16=False)
    return [xml, target.with_suffix(".bin")]


def has_bf16() -> bool:
    """Returns whether OpenVINO multiplies in bf16 on this CPU. Raises BackendError without openvino."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_cpu(precision: CpuPrecision) -> None:
    """Raises BackendError if this CPU cannot multiply in `precision`."""
    if precision == "bf16" and not has_bf16():
        raise BackendError("openvino: this CPU has no bf16 instructions; build with --precision fp32")


class OpenVinoGraph:
    """engines.backends.adapters.Graph of one .xml that `convert` wrote.

    buckets: ascending batch sizes; a batch runs in the smallest that holds it, padded with its last row. cache: folder
    for compiled models; if it cannot be written or holds damaged files, models are compiled again. `from_cache`: the
    buckets whose model came from the cache.

    Raises BackendError without openvino or on a CPU without `precision`, ArtifactError if the file cannot be read.
    """

    def __init__(self, xml: Path, precision: CpuPrecision, buckets: Sequence[int], cache: Path):
        vendor = _openvino()
        check_cpu(precision)
        self._buckets = tuple(buckets)
        settings = {
            "INFERENCE_PRECISION_HINT": _HINT[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # the operator may have bound the process to some cores
        }
        core = vendor.Core()
        settings["CACHE_DIR"] = str(cache / _cache_key(vendor, core, settings))
        try:
            models = {size: self._compile(core, xml, size, settings) for size in self._buckets}
        except RuntimeError as error:
            raise ArtifactError(f"{xml.name}: OpenVINO cannot load it ({_last_line(error)}); build it again") from error
        self.from_cache = tuple(size for size, model in models.items() if model.get_property("LOADED_FROM_CACHE"))
        self._requests = {size: model.create_infer_request() for size, model in models.items()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        batch = next(iter(inputs.values())).shape[0]
        bucket = smallest_fitting(batch, self._buckets)
        feed = {name: pad_batch(value, bucket).numpy() for name, value in inputs.items()}
        request = self._requests[bucket]
        outputs = request.infer(feed, share_inputs=True)
        return [torch.from_numpy(outputs[port][:batch]) for port in request.model_outputs]

    @staticmethod
    def _compile(core: Any, xml: Path, batch: int, settings: Mapping[str, Any]) -> Any:
        model = core.read_model(xml)
        shapes = {port: port.get_partial_shape() for port in model.inputs}
        for shape in shapes.values():
            shape[0] = batch
        model.reshape(shapes)
        return core.compile_model(model, "CPU", settings)


def _cache_key(vendor: Any, core: Any, settings: Mapping[str, Any]) -> str:
    """Returns a folder name from everything that decides the compiled model and is not in OpenVINO's key."""
    capabilities = sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    identity = repr((vendor.__version__, capabilities, cpu_flags(), sorted(settings.items())))
    return f"{settings['INFERENCE_PRECISION_HINT']}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError("openvino: the package is missing; pip install '.[openvino]'") from error
    return openvino
