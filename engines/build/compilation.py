"""Compiles an exported graph for a target by the compiler of its backend."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.backends import openvino
from engines.backends.tensorrt import vendor
from engines.backends.tensorrt.builder import build_engine
from engines.build.targets import Target


def compile_graph(
    target: Target, graph: Path, batches: Sequence[int], timing_cache: Path
) -> tuple[Sequence[Path], Mapping[str, object]]:
    """Compiles a graph into files beside it; returns them and details. Raises BuildError, BackendError."""
    stem = graph.with_suffix("")
    if target.backend == "openvino":
        return openvino.convert(graph, stem), {}
    assert target.capability is not None
    plan = stem.with_suffix(".engine")
    package = vendor.vendor(target.vendor)
    return [plan], build_engine(package, graph, plan, batches, target.capability, timing_cache)
