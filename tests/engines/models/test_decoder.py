"""Folded upsampling and the CPU's decoder equal the modules that they replace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_modules import AUTOENCODER
from small_checkpoint import randomise_weights

from engines.backends.base import ModuleSpec
from engines.backends.cpu.decoder import CpuDecoder
from engines.backends.eager import eager
from engines.backends.parity import difference
from engines.models.dcae import Autoencoder, AutoencoderConfig, Upsample
from engines.models.folding import FoldedUpsample, fold
from engines.models.pixels import PixelDecoder

needs_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no packed convolutions in bf16 (AVX512 or AVX-NE-CONVERT)",
)

SPEC = ModuleSpec("decoder", torch.float32, torch.device("cpu"), max_batch=4)

# Narrow variants: six stages as published, five without the finest as DC-AE-Lite and tiny, and with pixel shuffle.
WHOLE = AutoencoderConfig(
    attention_head_dim=8,
    encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
    encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
    decoder_block_out_channels=(8, 16, 32, 32, 64, 64),
    decoder_layers_per_block=(2, 1, 1, 1, 1, 2),
)
ARCHITECTURES = {
    "published": WHOLE,
    "tiny": AUTOENCODER,
    "silu at the end": replace(WHOLE, decoder_conv_act_fn="silu", decoder_in_shortcut=False),
    "shuffling": replace(WHOLE, upsample_block_type="pixel_shuffle"),
    "lite": replace(WHOLE, upsample_block_type="pixel_shuffle", decoder_layers_per_block=(0, 1, 1, 1, 1, 1)),
}


def autoencoder(config: AutoencoderConfig, dtype: torch.dtype = torch.float32) -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = randomise_weights(Autoencoder(config)).to(dtype).requires_grad_(False)
    assert isinstance(decoder, Autoencoder)
    return decoder


def latents(config: AutoencoderConfig, *shape: int) -> torch.Tensor:
    return torch.randn(shape[0], config.latent_channels, *shape[1:], generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("interpolate", [True, False], ids=["interpolate", "shuffle"])
@pytest.mark.parametrize("channels", [(16, 16), (16, 8), (32, 8), (8, 16)], ids=str)
@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "plain"])
def test_folded_upsampling_is_exact(interpolate: bool, channels: tuple[int, int], shortcut: bool) -> None:
    reference = Upsample(*channels, interpolate, shortcut).double().requires_grad_(False)
    x = torch.randn(2, channels[0], 5, 7, dtype=torch.float64)
    torch.testing.assert_close(FoldedUpsample(reference)(x), reference(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@pytest.mark.parametrize("size", [(1, 5, 3), (2, 6, 8)], ids=str)
@torch.inference_mode()
def test_equals_the_decoder(config: AutoencoderConfig, size: tuple[int, int, int]) -> None:
    """Attention takes the quadratic order at 5x3 cells and the linear one at 6x8; fp32."""
    x = latents(config, *size)
    expected = autoencoder(config).decoder(x)
    for decoder in (CpuDecoder(autoencoder(config).decoder), fold(autoencoder(config).decoder)):
        assert (decoder(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(decoder(x), decoder(x))  # no call changes the state


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@pytest.mark.parametrize("numbers", [1, 5_000, 20_000])
@pytest.mark.parametrize("cells", [(6, 8), (5, 7)], ids=str)
@torch.inference_mode()
def test_strips_change_nothing(
    config: AutoencoderConfig, cells: tuple[int, int], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tries the smallest strips and larger ones, so that the last strip is shorter, down to one row."""
    x = latents(config, 2, *cells)
    expected = autoencoder(config).decoder(x)
    monkeypatch.setattr("engines.backends.cpu.convolution.STRIP_NUMEL", numbers)
    actual = CpuDecoder(autoencoder(config).decoder)(x)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@needs_bf16
@pytest.mark.parametrize("config", [ARCHITECTURES["published"], AUTOENCODER], ids=["published", "tiny"])
@torch.inference_mode()
def test_in_bf16_as_near_as_the_decoder_itself(config: AutoencoderConfig) -> None:
    rounded = autoencoder(config, torch.bfloat16)
    x = latents(config, 2, 6, 8)
    expected = PixelDecoder(autoencoder(config, torch.bfloat16).float())(x)[0]
    reference = difference(expected, PixelDecoder(rounded)(x)[0]).psnr_db
    packed = PixelDecoder(rounded)
    packed.decoder = CpuDecoder(rounded.decoder)
    fast = difference(expected, packed(x)[0]).psnr_db
    assert reference is not None
    assert fast is not None
    assert fast >= reference - 1.5


@torch.inference_mode()
def test_eager_packs_decoders_on_a_cpu_and_keeps_images_independent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(WHOLE, decoder_block_out_channels=(8, 16, 32, 32, 64, 256))
    spec = replace(SPEC, cache=tmp_path, reasons={})
    decoder = eager(PixelDecoder(autoencoder(wide)), spec)
    assert "for ResBlock of 32 channels in float32 (direct " in spec.reasons["decoder"]
    assert isinstance(decoder.get_submodule("decoder"), CpuDecoder)
    for in_c in (True, False):  # a narrow one gains from kernels in C alone
        if not in_c:
            monkeypatch.setattr("engines.backends.eager.load_library", lambda _: None)
        narrow = eager(PixelDecoder(autoencoder(AUTOENCODER)), replace(SPEC, cache=tmp_path))
        assert isinstance(narrow.get_submodule("decoder"), CpuDecoder) == in_c
    x = latents(wide, 3, 4, 6)
    together, finite = decoder(x)
    assert finite.tolist() == [True, True, True]
    for index in range(3):
        alone, _ = decoder(x[index : index + 1])
        assert (alone[0].int() - together[index].int()).abs().max() <= 1
    x[1] = float("nan")
    assert decoder(x)[1].tolist() == [True, False, True]
