"""Reads LoRA files strictly, and fuses adapters into the transformer's weights.

A file is safetensors of diffusers' SanaLoraLoaderMixin (keys `transformer.<module>.lora_A.weight` and `lora_B`, config
in the metadata `lora_adapter_metadata`) or of peft (`base_model.model.<module>...`, config in adapter_config.json). An
adapter adds s * B @ A to the weight of a linear map or 1x1 convolution. s is alpha / rank, or alpha / sqrt(rank) with
rslora; without alpha it is 1, as in diffusers.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.weights import Component, WeightSource, meta_init
from engines.errors import CheckpointError
from engines.models.lora import Factors, is_adaptable
from engines.models.transformer import SprintTransformer
from engines.types import AdapterOption

_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder: diffusers', peft's
_PREFIXES = ("base_model.model.", "transformer.")
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora\.down|lora\.up)(\.default)?\.weight|(?P<of>.+)\.alpha")
_DORA = ("dora_scale", "lora_magnitude_vector")
_DOWN = ("lora_A", "lora.down")


@dataclass(frozen=True)
class Adapter:
    """A LoRA that fits the transformer. factors: by the module's name, on the CPU; `up` includes s."""

    name: str
    path: Path
    sha256: str
    factors: Mapping[str, Factors]


@dataclass(frozen=True)
class FusedWeights:
    """A WeightSource with adapters fused into the transformer, each times its scale."""

    base: WeightSource
    adapters: tuple[tuple[Adapter, float], ...]

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Loads as the base does. Sums in fp32 and rounds once to `dtype`."""
        self.base.load_into(part, module, dtype, device)
        if part != "transformer":
            return
        for adapter, scale in self.adapters:
            for name, factors in adapter.factors.items():
                weight = module.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                added = scale * (factors.up.to(device) @ factors.down.to(device))
                weight.data = (weight.data.float() + added.view_as(weight)).to(dtype)

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def sha256(self) -> str:
        words = [f"{adapter.sha256} {scale}" for adapter, scale in self.adapters]
        return hashlib.sha256("\n".join([self.base.sha256(), *words]).encode()).hexdigest()


def with_adapters(
    checkpoint: Checkpoint, options: Sequence[AdapterOption], reasons: dict[str, str]
) -> tuple[Checkpoint, list[Adapter]]:
    """Returns the checkpoint with the adapters of a fixed scale fused, and the others, from which jobs choose.

    Adds "lora" to `reasons`. Raises CheckpointError.
    """
    if not options:
        return checkpoint, []
    names = [option.name for option in options]
    if len(set(names)) < len(names):
        raise CheckpointError(f"lora: got {', '.join(names)}; each needs a name of its own")
    adapters = read_adapters(options, checkpoint)
    reasons["lora"] = "; ".join(
        f"{option.name} {'by request' if option.scale is None else f'fused, scale {option.scale:g}'}"
        for option in options
    )
    pairs = list(zip(adapters, options, strict=True))
    fixed = tuple((adapter, option.scale) for adapter, option in pairs if option.scale is not None)
    if fixed:
        checkpoint = replace(checkpoint, weights=FusedWeights(checkpoint.weights, fixed))
    return checkpoint, [adapter for adapter, option in pairs if option.scale is None]


def read_adapters(options: Sequence[AdapterOption], checkpoint: Checkpoint) -> list[Adapter]:
    """Reads the adapter of each option. Raises CheckpointError with file and key for a mismatch."""
    with meta_init():
        like = SprintTransformer(checkpoint.transformer)
    return [_read(option, like, checkpoint.name) for option in options]


def _read(option: AdapterOption, like: SprintTransformer, checkpoint: str) -> Adapter:
    path = _file(option)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _refused(option, f"{path} is no safetensors file ({error})") from error
    config = _lora_config(option, path, metadata)
    downs, ups, alphas = _sorted_keys(option, tensors)
    modules = dict(like.named_modules())
    factors = {}
    for name in sorted(downs.keys() | ups.keys() | alphas.keys()):
        if name not in modules:
            raise _refused(option, f"unknown key: {name} is no module of the transformer of {checkpoint}")
        if not is_adaptable(modules[name]):
            raise _refused(
                option, f"{name} is a {_layer_type(modules[name])}; linear maps and 1x1 convolutions are supported"
            )
        if name not in downs or name not in ups:
            raise _refused(option, f"{name} lacks its {'lora_A' if name not in downs else 'lora_B'}; both are needed")
        factors[name] = _factors(option, name, modules[name], downs[name], ups[name], alphas.get(name), config)
    if not factors:
        raise _refused(option, "holds no keys; lora_A and lora_B of modules of the transformer are needed")
    return Adapter(option.name, path, hashlib.sha256(path.read_bytes()).hexdigest(), factors)


def _sorted_keys(
    option: AdapterOption, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Returns lora_A, lora_B and alpha, each by the name of the module."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if any(word in key for word in _DORA):
            raise _refused(option, f"{key}: this is DoRA, which is not supported; a plain LoRA is needed")
        plain = next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)
        match = _KEY.fullmatch(plain)
        if match is None or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise _refused(
                option, f"unknown key {key} ({tensor.dtype}); supported are <module>.lora_A.weight and .lora_B.weight"
            )
        if match["of"] is not None:
            alphas[match["of"]] = float(tensor)
        elif match["part"] in _DOWN:
            downs[match["module"]] = tensor
        else:
            ups[match["module"]] = tensor
    return downs, ups, alphas


def _factors(
    option: AdapterOption,
    name: str,
    module: nn.Module,
    down: Tensor,
    up: Tensor,
    alpha: float | None,
    config: Mapping[str, Any],
) -> Factors:
    weight = module.weight
    assert isinstance(weight, Tensor)
    out, inputs = weight.shape[:2]
    rank = down.shape[0] if down.ndim else 0
    tail = weight.shape[2:]
    shapes = {"lora_A": ((rank, inputs), down), "lora_B": ((out, rank), up)}
    for part, (shape, tensor) in shapes.items():
        if rank == 0 or tuple(tensor.shape) not in (shape, (*shape, *tail)):
            raise _refused(
                option, f"{name}.{part} has shape {list(tensor.shape)}, [{shape[0]}, {shape[1]}] is needed there"
            )
    if alpha is None:
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(down.float().view(rank, inputs), scale * up.float().view(out, rank))


def _lora_config(option: AdapterOption, path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns peft's LoraConfig of the transformer, from the file or from beside it; empty without one."""
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in config.items()}
        elif path.name == _NAMES[1] and beside.is_file():
            config = json.loads(beside.read_bytes())
        else:
            return {}
        if not isinstance(config.get("lora_alpha", 1), int | float):
            raise ValueError(f"lora_alpha is {config['lora_alpha']!r}")
    except (ValueError, AttributeError) as error:
        raise _refused(option, f"{path}: its LoraConfig cannot be read ({error})") from error
    if config.get("use_dora"):
        raise _refused(option, "this is DoRA (use_dora), which is not supported; a plain LoRA is needed")
    if config.get("peft_type", "LORA") != "LORA":
        raise _refused(option, f"peft_type is {config['peft_type']}, supported is LORA")
    return dict(config)


def _pattern(patterns: object, name: str, default: float) -> float:
    """Returns the value of the first pattern that ends a module's name, as in peft's get_pattern_key."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
    return default


def _file(option: AdapterOption) -> Path:
    path = Path(option.path).expanduser()
    if path.is_dir():
        files = [path / name for name in _NAMES if (path / name).is_file()]
        if not files:
            raise _refused(option, f"{path} holds neither {' nor '.join(_NAMES)}")
        return files[0]
    if not path.is_file():
        raise _refused(option, f"no file {path}; a safetensors file, or a folder with one, is needed")
    return path


def _layer_type(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        grouped = " depthwise" if module.groups > 1 else ""
        return f"{module.kernel_size[0]}x{module.kernel_size[1]}{grouped} convolution"
    return type(module).__name__


def _refused(option: AdapterOption, reason: str) -> CheckpointError:
    return CheckpointError(f"lora {option.name}: {reason}")
