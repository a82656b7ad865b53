"""Strongly typed ONNX to a TensorRT engine.

One builder serves both vendors, given as a module: `tensorrt` (10 and 11, on the card) and `tensorrt_rtx` (ahead of
time, for a compute capability that need not be here). Precision lives in the graph alone; no flag of TensorRT 10's weak
typing is used, because 11 has none. One optimisation profile per batch bucket, min = best = max: kernels are chosen for
the very shapes that run, and a CUDA graph's context never changes shape.
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
    """Compiles the ONNX file `graph` into `target`; gives what is worth telling of it.

    batches: the buckets, each with a profile of its own. capability: of the card that is to run it, which only
    tensorrt_rtx may differ from the card that is here. timing_cache: read and written, where the vendor has one.
    Raises BuildError with the node that is refused, or the first error.
    """
    log = Log()
    logger = log.attach(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"{graph.stem}: {trt.__name__} refuses the graph: {_parser_error(parser, log)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that an inspector can tell layers' precisions
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
    """Whether `trt` is tensorrt_rtx, which builds for cards that are not here; tensorrt builds for the one that is."""
    return hasattr(trt, "ComputeCapability")


def _set_target(trt: Any, config: Any, capability: Capability) -> None:
    """tensorrt_rtx is told its target always: without one it accepts fp8 for cards that have none."""
    if not _ahead_of_time(trt):
        return
    name = f"SM{capability[0]}{capability[1]}"
    if not hasattr(trt.ComputeCapability, name):
        raise BuildError(f"gpu: {trt.__name__} {trt.__version__} does not build for compute capability {name[2:]}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _load_timing(trt: Any, config: Any, path: Path) -> bool:
    """Gives `config` the kernels' timings of earlier builds; tensorrt_rtx times nothing when it builds.

    Those of another card or version are refused, and an empty cache takes their place.
    """
    if _ahead_of_time(trt):
        return False
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    return False
