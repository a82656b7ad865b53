"""Exports modules to ONNX: strongly typed, with a dynamic batch and fixed height, width and text length.

The graph has the dtypes of the torch module: export one in the precision that runs. Computations of the module in fp32
(norm statistics, linear attention, time embedding) stay fp32. The export folds constants of fixed shapes (positions,
concatenated weights). Time and guidance stay inputs, because jobs choose them. Source: torch.onnx, dynamo exporter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from engines.backends.base import ModuleName
from engines.backends.quiet import quiet
from engines.errors import BuildError

OPSET = 20  # QuantizeLinear of float8 with fp16 scales needs 19
OUTPUTS: Mapping[ModuleName, tuple[str, ...]] = {
    "transformer": ("velocity",),
    "decoder": ("pixels", "finite"),
    "fast_decoder": ("pixels", "finite"),
    "encoder": ("latent",),
    "controlled": ("velocity",),
}
_LARGEST_BATCH = 64


def export_onnx(
    module: nn.Module,
    name: ModuleName,
    inputs: Mapping[str, Tensor],
    path: Path,
    translations: Mapping[Any, Any] | None = None,
) -> None:
    """Writes `module` to `path`, and to `path`.data beside it above 2 GB. inputs: at least two rows.

    translations: custom torch operator -> its ONNX (engines.build.quantization). Raises BuildError for a missing
    package or translation, OSError of the disk.
    """
    try:
        import onnx  # noqa: F401  # torch would import it later, with another message
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
                dynamic_shapes=_dynamic_batch(inputs),
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
    """Returns the graph and the file of its weights, if they lie beside it."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path]


def _fold(model: Any) -> None:
    """Computes constants, inlines functions and removes dead nodes.

    torch's own `optimize` would also run onnxscript's rewrite rules. One of them takes constants below 1e-8 for zeros
    and drops "x + 1e-15" (onnxscript/rewriter/_pattern_ir.py, abs_tol). Linear attention then divides 0 by 0 for a
    query without a positive feature.
    """
    from onnxscript import optimizer

    with quiet():
        optimizer.inline(model)
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)


def _dynamic_batch(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    return {key: {0: batch} for key in inputs}


def _cause(error: BaseException) -> str:
    """Returns the first line of the innermost error, which the exporter wraps in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
