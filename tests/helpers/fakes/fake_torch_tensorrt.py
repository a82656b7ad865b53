"""A fake of torch_tensorrt (2.14) for CPUs that returns programs unchanged."""

from types import SimpleNamespace
from typing import Any

import torch

__version__ = "2.14.0"
calls: list[str] = []
settings: list[dict[str, Any]] = []


def _compile(exported_program: Any, inputs: Any = None, *, kwarg_inputs: Any = None, **options: Any) -> Any:
    assert isinstance(exported_program, torch.export.ExportedProgram)
    assert inputs is None
    calls.append("compile")
    settings.append(options)
    assert all(not value.is_inference() for value in kwarg_inputs.values())
    return exported_program


dynamo = SimpleNamespace(compile=_compile)


def save(module: Any, file_path: str = "", *, kwarg_inputs: dict[str, torch.Tensor] | None = None) -> None:
    assert kwarg_inputs
    calls.append("save")
    torch.export.save(module, file_path)


def load(file_path: str = "") -> torch.export.ExportedProgram:
    calls.append("load")
    try:
        return torch.export.load(file_path)
    except Exception as error:
        raise ValueError(f"The file {file_path} doesn't correspond to a valid ExportedProgram") from error
