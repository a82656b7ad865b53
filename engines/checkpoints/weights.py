"""Weights of a checkpoint's parts into modules: strictly, from safetensors only, without a second copy in memory.

A *part* is a subfolder of the diffusers layout: transformer, vae, text_encoder, tokenizer. Modules are built on the
meta device and get their tensors assigned; files are memory-mapped.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engines.checkpoints.variants import choose_variant, index_file, single_file
from engines.errors import CheckpointError

Component = Literal["transformer", "vae", "text_encoder", "controlnet"]


class WeightSource(Protocol):
    """Where weights come from: a folder, or a seed (engines.checkpoints.random_weights)."""

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Gives every parameter of `module` (built on the meta device) its value, as `dtype` on `device`."""

    def tokenizer(self) -> Tokenizer: ...

    def sha256(self) -> str:
        """Hex digest that changes when any weight of any part does."""


class _NoInitialisation(TorchFunctionMode):
    """Draws no first values; on the meta device that would import torch's compiler, a second of every start."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        given = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else given["tensor"]
        return function(*arguments, **given)


@contextmanager
def meta_init() -> Iterator[None]:
    """Within the block modules are built without values, on the meta device, to be filled by a WeightSource."""
    with torch.device("meta"), _NoInitialisation():
        yield


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Makes `tensors` the parameters of `module`, frozen. Raises CheckpointError naming keys that are missing, left
    over or of another shape; `source` says whose they are."""
    wanted = module.state_dict()
    missing, left_over = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or left_over:
        raise CheckpointError(f"{source}: missing keys: {_some(missing)}; unknown keys: {_some(left_over)}")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            found, needed = list(tensor.shape), list(wanted[key].shape)
            raise CheckpointError(f"{source}: {key} has shape {found}, its config.json asks for {needed}")
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) or "none"
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


@dataclass(frozen=True)
class FolderWeights:
    """The folder of each part, so that a part (another decoder) may lie elsewhere. `variant`: see variants.py."""

    folders: Mapping[str, Path]
    variant: str | None = None

    def variants(self) -> dict[str, list[str]]:
        """The variants that are read beside the plain one, with their parts."""
        found: dict[str, list[str]] = {}
        for part in sorted(self.folders.keys() - {"tokenizer"}):
            names = [path.name for path in self.folders[part].glob("*")]
            taken = choose_variant(names, self.variant, str(self.folders[part]))
            if taken:
                found.setdefault(taken, []).append(part)
        return found

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Raises CheckpointError where a file is absent, damaged, quantised, or does not fit the config."""
        folder = self.folders[part]
        tensors: dict[str, Tensor] = {}
        for path in weight_files(folder, self.variant):
            try:
                tensors |= load_file(path, device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
        for key, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise CheckpointError(f"{folder}: {key} is {tensor.dtype}; float32, bfloat16 or float16 is needed")
            tensors[key] = tensor.to(device=device, dtype=dtype)
        load_strict(module, tensors, str(folder))
        module.to(device)  # buffers that no checkpoint holds; never their type, which upstream keeps at float32

    def tokenizer(self) -> Tokenizer:
        path = self.folders["tokenizer"] / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path.parent}: no tokenizer.json; a slow tokenizer (tokenizer.model) is not enough")
        try:
            return Tokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
        except Exception as error:  # the Rust side raises Exception itself
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error

    def sha256(self) -> str:
        """Files are read once, side by side, however often it is asked for."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = sorted(self.folders.keys() - {"tokenizer"})
        files = [(part, path) for part in parts for path in weight_files(self.folders[part], self.variant)]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_sha256_of, [path for _, path in files]))
        lines = [f"{part} {path.name} {digest}\n" for (part, path), digest in zip(files, digests, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors of one part: the single file, or all that its index names; which ones of several, says
    engines.checkpoints.variants.choose_variant. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a SANA-Sprint checkpoint in the diffusers layout has one")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    taken = choose_variant(names, variant, str(folder))
    if taken is not None:
        single, named = single_file(names, taken), index_file(names, taken)
        if single is not None:
            return [folder / single]
        if named is not None:
            index = folder / named
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: names no files; an index with a weight_map is needed")
            paths = [folder / str(name) for name in sorted(set(weight_map.values()))]
            absent = [path.name for path in paths if not path.is_file()]
            if absent:
                raise CheckpointError(f"{index}: files it names are absent: {_some(absent)}; download them")
            return paths
    present = _some(sorted(name for name in names if name != "config.json"))
    raise CheckpointError(f"{folder}: weights must be model.safetensors or an index of such; found: {present}")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a SANA-Sprint checkpoint in the diffusers layout has one")
    try:
        content = json.loads(path.read_bytes())  # bytes: a byte order mark says how they are encoded
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, an object is needed")
    return content
