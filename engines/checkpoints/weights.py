"""Loads weights of a checkpoint's components into modules: strictly, from safetensors, without a second copy.

A *component* is a subfolder of the diffusers layout: transformer, vae, text_encoder, controlnet; or one half of the
autoencoder in vae. The component decoder is a TAESANA: a folder, or the published .pth file. Modules start on the meta
device and take the loaded tensors.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engines.checkpoints.variants import choose_variant, index_file, single_file
from engines.errors import CheckpointError

Component = Literal["transformer", "vae", "vae.encoder", "vae.decoder", "text_encoder", "controlnet", "decoder"]


class WeightSource(Protocol):
    """A source of weights: a folder, or a seed (engines.checkpoints.random_weights)."""

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Sets every parameter of `module` (on the meta device) to its value, as `dtype` on `device`."""

    def tokenizer(self) -> Tokenizer: ...

    def sha256(self) -> str:
        """Returns a hex digest that changes with any weight of any component."""


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init, which on the meta device imports torch's compiler: a second of every start."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **keywords)


@contextmanager
def meta_init() -> Iterator[None]:
    """Builds modules within the block on the meta device, without values, for a WeightSource."""
    with torch.device("meta"), _NoInitialisation():
        yield


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Makes `tensors` the frozen parameters of `module`.

    Raises CheckpointError, which begins with `source`, for keys that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(f"{source}: missing keys: {_some(missing)}; unknown keys: {_some(unknown)}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            shape, needed = list(tensor.shape), list(expected[key].shape)
            raise CheckpointError(f"{source}: {key} has shape {shape}, its config.json asks for {needed}")
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) or "none"
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


@dataclass(frozen=True)
class FolderWeights:
    """A folder per component, as another decoder may lie elsewhere. `variant`: see engines.checkpoints.variants."""

    folders: Mapping[str, Path]
    variant: str | None = None

    def variants(self) -> dict[str, list[str]]:
        """Returns each variant in use but the plain one, with its components."""
        variants: dict[str, list[str]] = {}
        for part in sorted(self.folders.keys() - {"tokenizer", "decoder"}):
            names = [path.name for path in self.folders[part].glob("*")]
            variant = choose_variant(names, self.variant, str(self.folders[part]))
            if variant:
                variants.setdefault(variant, []).append(part)
        return variants

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Raises CheckpointError for a file that is missing, damaged, quantised or of another shape.

        Half of the autoencoder takes the keys of its name alone, and reads no others.
        """
        name, _, half = part.partition(".")
        folder = self.folders[name]
        tensors: dict[str, Tensor] = {}
        for path in weight_files(folder, self.variant):
            try:
                tensors |= _load_pth(path) if path.suffix == ".pth" else _load_file(path, half)
            except (SafetensorError, OSError, UnpicklingError, RuntimeError) as error:
                raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
        for key, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise CheckpointError(f"{folder}: {key} is {tensor.dtype}; float32, bfloat16 or float16 is needed")
            tensors[key] = tensor.to(device=device, dtype=dtype)
        load_strict(module, tensors, f"{folder}, {half}" if half else str(folder))
        module.to(device)  # buffers outside the checkpoint; they keep float32, as upstream's

    def tokenizer(self) -> Tokenizer:
        path = self.folders["tokenizer"] / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path.parent}: no tokenizer.json; a slow tokenizer (tokenizer.model) is not enough")
        try:
            return Tokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
        except Exception as error:  # tokenizers raises Exception itself
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error

    def sha256(self) -> str:
        """Returns the digest; reads the files once, in parallel."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = sorted(self.folders.keys() - {"tokenizer"})
        files = [(part, path) for part in parts for path in weight_files(self.folders[part], self.variant)]
        digests = _digests([path for _, path in files])
        lines = [f"{part} {path.name} {digest}\n" for (part, path), digest in zip(files, digests, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def text_digests(self) -> list[str]:
        """The digest of each file of the text encoder; read once, in parallel."""
        return _digests(weight_files(self.folders["text_encoder"], self.variant))


def _load_file(path: Path, half: str) -> dict[str, Tensor]:
    """Returns the tensors of a file; with `half` those below this name, without it in their keys."""
    if not half:
        return load_file(path, device="cpu")
    prefix = f"{half}."
    with safe_open(path, framework="pt", device="cpu") as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  # no mapping
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def _load_pth(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file of torch.save, without running any code of it."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    return tensors


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of, paths))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Returns the safetensors of one component: the single file, or all files of its index.

    variant: see engines.checkpoints.variants.choose_variant. Raises CheckpointError.
    """
    if folder.suffix == ".pth" and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a SANA-Sprint checkpoint in the diffusers layout has one")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = choose_variant(names, variant, str(folder))
    if chosen is not None:
        single, named = single_file(names, chosen), index_file(names, chosen)
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


def file_stamps(weights: WeightSource, only: Component | None = None) -> list[list[object]]:
    """Returns name, size and modification time of each file; files of equal stamps need no new hash.

    only: one component. Empty for weights that are no files.
    """
    if not isinstance(weights, FolderWeights):
        return []
    stamps: list[list[object]] = []
    for part in sorted(weights.folders.keys() - {"tokenizer"}) if only is None else [only]:
        for path in weight_files(weights.folders[part], weights.variant):
            status = path.stat()
            stamps.append([f"{part}/{path.name}", status.st_size, status.st_mtime_ns])
    return stamps


def read_json(path: Path) -> dict[str, object]:
    """Returns the object in a JSON file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a SANA-Sprint checkpoint in the diffusers layout has one")
    try:
        content = json.loads(path.read_bytes())  # bytes: json detects the encoding from a byte order mark
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, an object is needed")
    return content
