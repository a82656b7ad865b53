"""Modules of the tiny recipe with seeded weights, of which every one matters, in any precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from small_checkpoint import randomise_weights
from torch import nn

from distill.recipes import tiny
from engines.backends.base import ModuleName
from engines.build.example_inputs import StaticShape
from engines.models.controlnet import ControlledTransformer, ControlNet, Injection
from engines.models.dcae import Autoencoder
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.models.transformer import SprintTransformer, TransformerConfig

T = TypeVar("T")

RECIPE = tiny()
assert RECIPE.teacher is not None
assert RECIPE.autoencoder is not None
TRANSFORMER = replace(RECIPE.teacher.architecture, num_layers=2)
AUTOENCODER = RECIPE.autoencoder.architecture
SHAPE = StaticShape(height=4, width=8, channels=32, compression=32, tokens=12, caption_channels=128)


def random_transformer(
    config: TransformerConfig = TRANSFORMER, dtype: torch.dtype = torch.float32
) -> SprintTransformer:
    """Draws norm weights from N(0, 1) too, since linear attention divides out a query's length."""
    module = _seeded(lambda: SprintTransformer(config))
    randomise_weights(module)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "norm_" in name:
            parameter.data.normal_(generator=generator)
    return module.to(dtype).eval().requires_grad_(False)


def random_controlled(dtype: torch.dtype = torch.float32, injection: Injection = "diffusers") -> ControlledTransformer:
    """Returns `random_transformer` with a ControlNet branch of one block."""
    transformer = random_transformer()
    branch = randomise_weights(ControlNet.of(transformer, 1, injection), 4)
    assert isinstance(branch, ControlNet)
    return ControlledTransformer(transformer, branch).to(dtype).eval().requires_grad_(False)


def random_module(name: ModuleName, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the engine's module `name` for SHAPE; the fast decoder is a TAESANA of the published size."""
    if name == "transformer":
        return random_transformer(dtype=dtype)
    if name == "controlled":
        return random_controlled(dtype)
    if name == "fast_decoder":
        taesana = randomise_weights(_seeded(lambda: TaesanaDecoder(TaesanaConfig())), 5).to(dtype).requires_grad_(False)
        assert isinstance(taesana, TaesanaDecoder)
        return PixelDecoder(taesana).eval()
    autoencoder = randomise_weights(_seeded(lambda: Autoencoder(AUTOENCODER))).to(dtype).requires_grad_(False)
    assert isinstance(autoencoder, Autoencoder)
    return (PixelDecoder(autoencoder) if name == "decoder" else PixelEncoder(autoencoder)).eval()


def _seeded(make: Callable[[], T]) -> T:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()
