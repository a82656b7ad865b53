"""The parts of a native engine, made of a checkpoint: with values to be built, without them to be loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from engines.artifacts.native.storages import META
from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.cuda.decoder import CudaDecoder
from engines.backends.cuda.transformer import CudaTransformer
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.weights import Part, WeightSource, assign
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.pipeline.native import Native
from engines.pipeline.text_stage import TextStage, load_text_stage

DTYPE = torch.bfloat16
PARTS = ("text", "transformer", "decoder", "encoder")  # by which their files begin


@dataclass(frozen=True)
class Parts:
    """Modules of a checkpoint as `--backend cuda-graph` runs them."""

    kernels: Native
    text: TextStage
    transformer: CudaTransformer
    decoder: Callable[..., Any]
    encoder: Callable[..., Any]
    dtype: torch.dtype = DTYPE

    @property
    def memory(self) -> dict[str, object]:
        """By the stem of its files, what a part consists of."""
        return dict(zip(PARTS, (self.text.encoder, self.transformer, self.decoder, self.encoder), strict=True))

    def controlled(self, branch: ControlNet) -> Callable[..., Any]:
        """With a ControlNet, whose weights are laid out here."""
        spec = _spec("controlled", next(branch.parameters()).device)
        return self.kernels(ControlledTransformer(self.transformer._module, branch), spec)

    def replica(self) -> "Parts":
        """As of engines.artifacts.loading.LoadedModules; kernels keep nothing between two launches."""
        return self


@dataclass(frozen=True)
class NoWeights:
    """In place of a checkpoint's weights: shapes and types alone, on the meta device."""

    real: WeightSource

    def fill(self, part: Part, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {key: torch.empty(like.shape, dtype=dtype, device=device) for key, like in module.state_dict().items()}
        assign(module, shapes, part)
        module.to(device)

    def tokenizer(self) -> Tokenizer:
        return self.real.tokenizer()

    def sha256(self) -> str:
        return self.real.sha256()


def modules_of(checkpoint: Checkpoint, kernels: Native, device: torch.device) -> dict[ModuleName, Callable[..., Any]]:
    """All but the text encoder, laid out in DTYPE."""
    autoencoder = checkpoint.load_autoencoder(DTYPE, device)
    return {
        "transformer": kernels(checkpoint.load_transformer(DTYPE, device), _spec("transformer", device)),
        "decoder": kernels(PixelDecoder(autoencoder), _spec("decoder", device)),
        "encoder": kernels(PixelEncoder(autoencoder), _spec("encoder", device)),
    }


def skeleton(checkpoint: Checkpoint, kernels: Native, ranges: Sequence[Sequence[float]]) -> Parts:
    """All parts on the meta device, in 8 bits where there are ranges; reads the tokenizer, and no weights."""
    blank = replace(checkpoint, weights=NoWeights(checkpoint.weights))
    text = kernels.text(load_text_stage(blank, DTYPE, META))
    modules = modules_of(blank, kernels, META)
    transformer, decoder = modules["transformer"], modules["decoder"]
    assert isinstance(transformer, CudaTransformer)
    if ranges:
        assert isinstance(decoder, CudaDecoder)
        decoder.include_ranges(ranges)
        decoder.to_fp8()
    return Parts(kernels, text, transformer, decoder, modules["encoder"])


def _spec(name: ModuleName, device: torch.device) -> ModuleSpec:
    return ModuleSpec(name, DTYPE, device, max_batch=1)
