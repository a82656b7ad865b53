"""The vendor's module, `tensorrt` or `tensorrt_rtx`."""

from importlib import import_module
from typing import Any

from engines.errors import BackendError


def vendor(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises BackendError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(f"{name}: the package is missing; pip install '.[{name.replace('_', '-')}]'") from error
