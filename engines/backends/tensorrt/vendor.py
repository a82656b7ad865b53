"""Imports the vendor's module, `tensorrt` or `tensorrt_rtx`."""

from importlib import import_module
from typing import Any

from engines.errors import BackendError


def vendor(name: str) -> Any:
    """Imports the module `tensorrt` or `tensorrt_rtx`. Raises BackendError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(f"{name}: the package is missing; pip install '.[{name.replace('_', '-')}]'") from error
