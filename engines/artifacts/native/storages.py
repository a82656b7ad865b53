"""Saves the memory of laid-out modules to files and attaches it again, without a second layout.

A *skeleton* is the same object on the meta device: it lists the tensors and shows which of them share memory. A
*storage* is one piece of memory, named after its first tensor. A save writes each storage once; a load reads it to the
device and puts views of it into the skeleton.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.errors import ArtifactError

_FILE_BYTES = 2**29  # of a file, unless one storage is larger; a load reads files in parallel
META = torch.device("meta")


class TensorView(NamedTuple):
    """A tensor of a skeleton and its path in the object."""

    path: str
    tensor: Tensor  # on the meta device


@dataclasses.dataclass(frozen=True)
class Storage:
    """One piece of memory of a skeleton, with all tensors in it."""

    name: str
    bytes: int
    views: tuple[TensorView, ...]


def storages_of(skeleton: object) -> list[Storage]:
    """Returns the storages of an object in the order of a walk through its attributes."""
    groups: dict[int, list[TensorView]] = {}
    for path, tensor in _tensors(skeleton):
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(TensorView(path, tensor))
    return [
        Storage(views[0].path, views[0].tensor.untyped_storage().nbytes(), tuple(views)) for views in groups.values()
    ]


@torch.inference_mode()
def save(skeleton: object, filled: object, folder: Path, stem: str) -> list[Path]:
    """Writes the values of `filled`, which has the skeleton's structure, to <stem>-<number>.safetensors.

    Returns the paths.
    """
    values = dict(_tensors(filled))
    files: list[Path] = []
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        path = folder / f"{stem}-{len(files) + 1}.safetensors"
        save_file(waiting, path)
        path.chmod(0o644)  # safetensors makes it private; the server may run as another user
        files.append(path)
        waiting.clear()

    for storage in storages_of(skeleton):
        if waiting and sum(value.nbytes for value in waiting.values()) + storage.bytes > _FILE_BYTES:
            write()
        dtype = storage.views[0].tensor.dtype
        memory = torch.zeros(storage.bytes // dtype.itemsize, dtype=dtype)
        for path, tensor in storage.views:
            _view(memory, tensor).copy_(values.pop(path))
        waiting[storage.name] = memory
    if waiting:
        write()
    if values:
        raise AssertionError(f"not in the skeleton: {sorted(values)}")
    return files


def attach_memory(skeleton: Any, memory: dict[str, Tensor], device: torch.device) -> Any:
    """Returns the skeleton with views of `memory` (storage -> flat tensor) as its tensors. Raises ArtifactError."""
    views: dict[int, Tensor] = {}
    for storage in storages_of(skeleton):
        flat = memory.pop(storage.name, None)
        if flat is None or flat.nbytes != storage.bytes:
            has = "nothing" if flat is None else f"{flat.nbytes} bytes"
            raise ArtifactError(f"{storage.name}: {storage.bytes} bytes are needed, the engine has {has}")
        views |= {id(view.tensor): _view(flat, view.tensor) for view in storage.views}
    if memory:
        raise ArtifactError(f"{sorted(memory)[0]}: the engine has it, and nothing needs it")

    def filled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return nn.Parameter(views[id(value)], False) if isinstance(value, nn.Parameter) else views[id(value)]
        return device if isinstance(value, torch.device) and value.type == "meta" else value

    return _mapped(skeleton, filled, {})


def _view(memory: Tensor, like: Tensor) -> Tensor:
    return memory.view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())


def _tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor once, with its path of attributes, keys and indices."""
    seen: set[int] = set()
    paths: list[tuple[str, Any]] = [("", value)]
    while paths:
        path, value = paths.pop()
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen.add(id(value))
                yield path, value
            continue
        parts = _parts(value)
        if parts is None or id(value) in seen:
            continue
        seen.add(id(value))
        paths += [(f"{path}.{name}" if path else str(name), part) for name, part in reversed(parts)]


def _parts(value: Any) -> list[tuple[object, Any]] | None:
    """Returns (name, value) of the members of an object; None for an object without members."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, nn.Module) or type(value).__module__.startswith("engines."):
        return list(getattr(value, "__dict__", {}).items())
    return None


def _mapped(value: Any, change: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """Applies `change` to all leaves of `value`; objects, lists and dicts keep their identity."""
    parts = None if isinstance(value, Tensor) else _parts(value)
    if parts is None:
        return change(value)
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = value
    if isinstance(value, tuple):
        changed = [_mapped(part, change, known) for _, part in parts]
        known[id(value)] = type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
        return known[id(value)]
    into: Any = value if isinstance(value, dict | list) else value.__dict__
    for name, part in parts:
        into[name] = _mapped(part, change, known)
    return value
