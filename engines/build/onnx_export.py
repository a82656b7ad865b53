"""Modules to ONNX: strongly typed, batch open, height, width and text length fixed.

The types of the graph are those of the torch module it is traced from: give one of the precision that is to run. What
the module computes in fp32 (norm statistics, linear attention, time embedding) stays fp32. Constants of fixed shapes
(positions, concatenated weights) are folded. Time and guidance stay inputs, because every job chooses its guidance and
image-to-image its time. Source of the route: torch.onnx, dynamo exporter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from engines.backends.base import ModuleName
from engines.backends.quiet import quiet
from engines.errors import BuildError

OPSET = 20  # QuantizeLinear of float8 with fp16 scales needs 19
OUTPUTS: Mapping[ModuleName, tuple[str, ...]] = {
    "transformer": ("velocity",),
    "decoder": ("pixels", "finite"),
    "encoder": ("latent",),
    "controlled": ("velocity",),
}
_LARGEST_BATCH = 64


def export_program(module: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """torch.export with one open batch for all `inputs`, which must hold at least two rows."""
    with quiet():
        return torch.export.export(module.eval(), (), dict(inputs), dynamic_shapes=_open_batch(inputs))


def export_onnx(
    module: nn.Module,
    name: ModuleName,
    inputs: Mapping[str, Tensor],
    path: Path,
    translations: Mapping[Any, Any] | None = None,
) -> None:
    """Writes `module` to `path` (and `path`.data beside it where it is over 2 GB), named inputs and outputs.

    translations: how custom torch operators become ONNX (engines.build.quantization). Raises BuildError where the
    package is missing or an operator has no translation; OSError where the disk is full.
    """
    try:
        import onnx  # noqa: F401  # torch imports it late, with a message of its own
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BuildError(f"export: the package {error.name} is missing; pip install '.[build]'") from error
    from torch.onnx import OnnxExporterError

    try:
        with quiet(), torch.inference_mode():
            program = torch.onnx.export(
                module.eval(),
                (),
                kwargs=dict(inputs),
                dynamo=True,
                dynamic_shapes=_open_batch(inputs),
                output_names=list(OUTPUTS[name]),
                opset_version=OPSET,
                optimize=False,  # see _fold
                custom_translation_table=dict(translations) if translations else None,
                verbose=False,
            )
    except OnnxExporterError as error:
        raise BuildError(f"export: {name} cannot be written as ONNX: {_cause(error)}") from error
    assert program is not None
    _fold(program.model)
    program.save(str(path))


def onnx_files(path: Path) -> Sequence[Path]:
    """The graph and, where the weights lie beside it, their file."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path]


def _fold(model: Any) -> None:
    """Constants computed, helpers inlined, dead nodes removed; and no more.

    torch's own `optimize` would also run onnxscript's rewrite rules, one of which takes any constant below 1e-8 for a
    zero and drops "x + 1e-15" (onnxscript/rewriter/_pattern_ir.py, abs_tol): linear attention then divides 0 by 0
    wherever no feature of a query is positive.
    """
    from onnxscript import optimizer

    with quiet():
        optimizer.inline(model)
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)


def _open_batch(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    return {key: {0: batch} for key in inputs}


def _cause(error: BaseException) -> str:
    """The last line of what lies deepest, because the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
