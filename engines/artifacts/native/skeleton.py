"""The modules of a native engine, from a checkpoint: with values for a build, without values for a load."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from engines.artifacts.native.storages import META
from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.cuda.transformer import CudaTransformer
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.weights import Component, WeightSource, load_strict
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.pixels import PixelEncoder
from engines.pipeline.native import NativeBackend, Ranges
from engines.pipeline.text_stage import TextStage, load_text_stage

DTYPE = torch.bfloat16
MODULE_NAMES = ("text", "transformer", "decoder", "encoder", "fast_decoder")  # prefixes of their files


@dataclass(frozen=True)
class NativeModules:
    """Modules of a checkpoint as `--backend cuda-graph` runs them."""

    kernels: NativeBackend
    text: TextStage
    transformer: CudaTransformer
    decoder: Callable[..., Any]
    encoder: Callable[..., Any]
    fast_decoder: Callable[..., Any] | None = None
    dtype: torch.dtype = DTYPE

    @property
    def memory(self) -> dict[str, object]:
        """Returns prefix of files -> module."""
        modules = (self.text.encoder, self.transformer, self.decoder, self.encoder, self.fast_decoder)
        named = zip(MODULE_NAMES, modules, strict=True)
        return {name: module for name, module in named if module is not None}

    def controlled(self, branch: ControlNet) -> Callable[..., Any]:
        """Returns the transformer with a ControlNet, whose weights it lays out."""
        spec = _spec("controlled", next(branch.parameters()).device)
        return self.kernels(ControlledTransformer(self.transformer._module, branch), spec)

    def new_context(self) -> "NativeModules":
        """Returns these modules, as kernels hold no state between launches (see LoadedModules.new_context)."""
        return self


@dataclass(frozen=True)
class ShapesOnly:
    """A WeightSource without values: shapes and dtypes on the meta device."""

    real: WeightSource

    def load_into(self, part: Component, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {key: torch.empty(like.shape, dtype=dtype, device=device) for key, like in module.state_dict().items()}
        load_strict(module, shapes, part)
        module.to(device)

    def tokenizer(self) -> Tokenizer:
        return self.real.tokenizer()

    def sha256(self) -> str:
        return self.real.sha256()


def modules_of(
    checkpoint: Checkpoint, kernels: NativeBackend, device: torch.device, fast: Checkpoint | None = None
) -> dict[ModuleName, Callable[..., Any]]:
    """Returns all modules but the text encoder, laid out in DTYPE. fast: with the decoder of this checkpoint too."""
    autoencoder = checkpoint.load_autoencoder(DTYPE, device)
    modules: dict[ModuleName, Callable[..., Any]] = {
        "transformer": kernels(checkpoint.load_transformer(DTYPE, device), _spec("transformer", device)),
        "decoder": kernels(checkpoint.load_pixel_decoder(autoencoder, DTYPE, device), _spec("decoder", device)),
        "encoder": kernels(PixelEncoder(autoencoder), _spec("encoder", device)),
    }
    if fast is not None:
        second = fast.load_pixel_decoder(None, DTYPE, device)
        modules["fast_decoder"] = kernels(second, _spec("fast_decoder", device))
    return modules


def skeleton(
    checkpoint: Checkpoint, kernels: NativeBackend, ranges: Ranges, fast: Checkpoint | None = None
) -> NativeModules:
    """Returns all modules on the meta device, in fp8 if there are ranges. Reads no weights."""
    blank, second = _blank(checkpoint), None if fast is None else _blank(fast)
    text = kernels.text(load_text_stage(blank, DTYPE, META))
    modules = modules_of(blank, kernels, META, second)
    transformer = modules["transformer"]
    assert isinstance(transformer, CudaTransformer)
    if ranges:
        kernels.quantise(ranges)
    decoders = modules["decoder"], modules["encoder"], modules.get("fast_decoder")
    return NativeModules(kernels, text, transformer, *decoders)


def _blank(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, weights=ShapesOnly(checkpoint.weights))


def _spec(name: ModuleName, device: torch.device) -> ModuleSpec:
    return ModuleSpec(name, DTYPE, device, max_batch=1)
