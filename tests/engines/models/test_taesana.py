"""TAESANA against a reference written from the published file, with seeded weights at its true widths."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.errors import CheckpointError
from engines.models.taesana import TaesanaConfig, TaesanaDecoder

# Positions in the published sequence of an upsampling; a convolution follows each.
_UPSAMPLE_THEN_CONV = (6, 11, 16, 21, 26)


def reference(weights: dict[str, Tensor], latent: Tensor) -> Tensor:
    """F32Decoder of madebyollin/taesd as functions of its state dict: latent to RGB in [0, 1]."""
    x = 3 * torch.tanh(latent / 3)
    x = F.relu(F.conv2d(x, weights["1.weight"], weights["1.bias"], padding=1))
    for position in range(3, 29):
        if position in _UPSAMPLE_THEN_CONV:
            x = F.interpolate(x, scale_factor=2)
        elif position - 1 in _UPSAMPLE_THEN_CONV:
            x = F.conv2d(x, weights[f"{position}.weight"], padding=1)
        else:
            y = x
            for layer in (0, 2, 4):
                name = f"{position}.conv.{layer}"
                y = F.conv2d(y, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
                y = y if layer == 4 else F.relu(y)
            x = F.relu(y + x)
    return F.conv2d(x, weights["29.weight"], weights["29.bias"], padding=1)


@pytest.fixture(scope="module")
def decoder() -> TaesanaDecoder:
    torch.manual_seed(7)
    return TaesanaDecoder(TaesanaConfig()).eval()


@torch.no_grad()
def test_decoder_equals_the_published_architecture(decoder: TaesanaDecoder) -> None:
    latent = 2 * torch.randn(2, 32, 3, 2, generator=torch.Generator().manual_seed(1))
    pixels = decoder(latent)
    assert pixels.shape == (2, 3, 96, 64)
    expected = reference(decoder.state_dict(), latent) * 2 - 1
    assert torch.allclose(pixels, expected, atol=1e-5)


def test_names_and_number_of_weights_are_the_published_ones(decoder: TaesanaDecoder) -> None:
    names = decoder.state_dict().keys()
    assert len(names) == 105
    assert all(re.fullmatch(r"\d+\.(conv\.[024]\.)?(weight|bias)", name) for name in names)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 8_301_763
    assert TaesanaConfig().compression == 32


def test_config_goes_through_a_file_and_names_what_it_does_not_know() -> None:
    config = TaesanaConfig(channels=(48, 24), blocks=(2, 1))
    assert TaesanaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(CheckpointError, match="unknown keys depth"):
        TaesanaConfig.from_dict({"depth": 3})
    with pytest.raises(CheckpointError, match="one positive number of each per stage"):
        TaesanaConfig(channels=(48, 24), blocks=(2,))
