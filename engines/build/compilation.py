"""Compiles an exported graph for a target by the compiler of its backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.backends import openvino
from engines.backends.tensorrt import vendor
from engines.backends.tensorrt.builder import build_engine
from engines.build.targets import Target


@dataclass(frozen=True)
class Compiled:
    """The files of one compiled graph, and details of its backend."""

    files: Sequence[Path]
    details: Mapping[str, object] = field(default_factory=dict)


def compile_graph(target: Target, graph: Path, stem: Path, batches: Sequence[int], timing_cache: Path) -> Compiled:
    """Compiles an exported graph for `target` into files named `stem`.<suffix>. Raises BuildError, BackendError."""
    if target.backend == "openvino":
        return Compiled(openvino.convert(graph, stem))
    assert target.capability is not None
    plan = stem.with_suffix(".engine")
    package = vendor.vendor(target.vendor)
    details = build_engine(package, graph, plan, batches, target.capability, timing_cache)
    return Compiled([plan], details)
