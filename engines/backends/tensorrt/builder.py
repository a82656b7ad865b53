"""Compiles strongly typed ONNX to a TensorRT engine.

One builder serves both vendor modules: `tensorrt` (10 and 11, on the card itself) and `tensorrt_rtx` (ahead of time,
for any compute capability). The graph alone sets the precision; TensorRT 10's flags for weak typing are unused, because
11 lacks them. Each batch bucket has an optimisation profile with min = best = max: TensorRT chooses kernels for exactly
these shapes, and the context of a CUDA graph never changes shape.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.backends.tensorrt.log import Log, paused_garbage_collection, summarise
from engines.device.hardware import Capability
from engines.errors import BuildError


@paused_garbage_collection()
def build_engine(
    trt: Any,
    graph: Path,
    target: Path,
    batches: Sequence[int],
    capability: Capability,
    timing_cache: Path,
) -> dict[str, object]:
    """Compiles the ONNX file `graph` into `target`; returns layer count, activation bytes and batches.

    batches: the buckets, one profile each. capability: that of the target card; only tensorrt_rtx builds for another
    card than this machine's. timing_cache: file to read and update, if the vendor times kernels.

    Raises BuildError with the node that TensorRT rejects, or with its first error.
    """
    log = Log()
    logger = log.attach(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"{graph.stem}: {trt.__name__} refuses the graph: {_parser_error(parser, log)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # the inspector needs it to report the layers' precisions
    _set_target(trt, config, capability)
    for batch in batches:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = (batch, *tuple(tensor.shape)[1:])
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    timed = _load_timing(trt, config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{graph.stem}: {trt.__name__} cannot compile the graph: {log.first_error()}")
    target.write_bytes(plan)
    if timed:
        timing_cache.write_bytes(config.get_timing_cache().serialize())
    return {"layers": network.num_layers, "activation_bytes": log.activation_bytes(), "batches": list(batches)}


def _parser_error(parser: Any, log: Log) -> str:
    if not parser.num_errors:
        return log.first_error()
    error = parser.get_error(0)
    name, kind = error.node_name(), error.node_operator()
    where = f"node {name} ({kind}): " if name or kind else ""
    return where + summarise(error.desc())


def _ahead_of_time(trt: Any) -> bool:
    """Returns whether `trt` is tensorrt_rtx; tensorrt builds only for this machine's card."""
    return hasattr(trt, "ComputeCapability")


def _set_target(trt: Any, config: Any, capability: Capability) -> None:
    """Sets the target of tensorrt_rtx, which without one accepts fp8 for cards that lack it."""
    if not _ahead_of_time(trt):
        return
    name = f"SM{capability[0]}{capability[1]}"
    if not hasattr(trt.ComputeCapability, name):
        raise BuildError(f"gpu: {trt.__name__} {trt.__version__} does not build for compute capability {name[2:]}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _load_timing(trt: Any, config: Any, path: Path) -> bool:
    """Loads the kernel timings of earlier builds into `config`; returns whether `config` has a timing cache.

    Starts an empty cache if TensorRT rejects the file, as for another card or version.
    """
    if _ahead_of_time(trt):
        return False
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    return False
