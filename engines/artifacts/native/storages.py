"""What laid-out modules hold in memory, to files and back: bytes as the kernels read them, without laying out again.

A *skeleton* is the same objects made on the meta device, where it costs nothing to make them: it says which tensors
there are and which of them share memory. A *storage* is such a piece of memory. Every storage is written once, named
after the first tensor in it; a load makes each on the device, reads it there, and puts views into the skeleton.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.errors import ArtifactError

_FILE_BYTES = 2**29  # of a file, unless one storage is larger; files are read side by side
META = torch.device("meta")


class TensorView(NamedTuple):
    """Where a tensor is found in its storage."""

    path: str
    tensor: Tensor  # on the meta device


@dataclasses.dataclass(frozen=True)
class Storage:
    """A piece of memory of a skeleton, and all tensors in it."""

    name: str
    bytes: int
    views: tuple[TensorView, ...]


def storages_of(skeleton: object) -> list[Storage]:
    """In the order in which a walk through the objects meets them."""
    found: dict[int, list[TensorView]] = {}
    for path, tensor in _tensors(skeleton):
        found.setdefault(tensor.untyped_storage()._cdata, []).append(TensorView(path, tensor))
    return [
        Storage(views[0].path, views[0].tensor.untyped_storage().nbytes(), tuple(views)) for views in found.values()
    ]


@torch.inference_mode()
def save(skeleton: object, made: object, folder: Path, stem: str) -> list[Path]:
    """Writes what `made` holds, which is the skeleton's like with values: the files <stem>-<number>.safetensors."""
    values = dict(_tensors(made))
    files: list[Path] = []
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        path = folder / f"{stem}-{len(files) + 1}.safetensors"
        save_file(waiting, path)
        path.chmod(0o644)  # safetensors leaves it to its owner alone; who serves may be another
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
    """The skeleton with views of `memory` (flat, by storage) in place of its tensors. Raises ArtifactError where the
    two do not fit."""
    views: dict[int, Tensor] = {}
    for storage in storages_of(skeleton):
        flat = memory.pop(storage.name, None)
        if flat is None or flat.nbytes != storage.bytes:
            has = "nothing" if flat is None else f"{flat.nbytes} bytes"
            raise ArtifactError(f"{storage.name}: {storage.bytes} bytes are needed, the engine has {has}")
        views |= {id(place.tensor): _view(flat, place.tensor) for place in storage.views}
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
    """Each once, with the path of attributes, keys and indices that leads to it."""
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
    """What an object consists of, by name; None for what is looked at no further."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, nn.Module) or type(value).__module__.startswith("engines."):
        return list(getattr(value, "__dict__", {}).items())
    return None


def _mapped(value: Any, change: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """`value` with `change` made to all that has no parts; objects, lists and dicts stay themselves."""
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
