"""The GPU decoder, by references on a CPU, equals the PyTorch module; in 8 bits it stays near."""

from dataclasses import replace

import pytest
import torch
from small_checkpoint import KERNEL_AUTOENCODER as SMALL
from small_checkpoint import randomise_weights

from engines.backends.cuda.decoder import CudaDecoder, unsupported_decoder
from engines.kernels.op import Ops, sqnr_db
from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.pixels import PixelDecoder


def decoders(dtype: torch.dtype = torch.float32) -> tuple[PixelDecoder, CudaDecoder]:
    module = PixelDecoder(randomise_weights(Autoencoder(SMALL)).to(dtype))  # type: ignore[arg-type]  # heat returns its argument's type
    return module, CudaDecoder(module, Ops(None))


@pytest.fixture
def latent() -> torch.Tensor:
    return torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_equals_the_module(latent: torch.Tensor) -> None:
    module, decoder = decoders()
    (expected, sound), (actual, flags) = module(latent), decoder(latent)
    assert flags.tolist() == sound.tolist() == [True] * 3
    assert 10 < expected.float().std() < 120
    assert (expected.int() - actual.int()).abs().max() <= 1


@torch.inference_mode()
def test_an_image_is_the_same_alone_and_in_a_batch(latent: torch.Tensor) -> None:
    _, decoder = decoders()
    together, _ = decoder(latent)
    for index in range(3):
        alone, _ = decoder(latent[index : index + 1])
        assert (alone[0].int() - together[index].int()).abs().max() <= 1


@torch.inference_mode()
def test_says_which_image_is_not_finite(latent: torch.Tensor) -> None:
    _, decoder = decoders()
    latent[1, 0, 0, 0] = float("nan")
    assert decoder(latent)[1].tolist() == [True, False, True]


@torch.inference_mode()
def test_8_bits_stay_near(latent: torch.Tensor) -> None:
    _, exact = decoders(torch.bfloat16)
    _, decoder = decoders(torch.bfloat16)
    decoder.calibrate(latent)
    decoder.to_fp8()
    reached = sqnr_db(exact(latent)[0], decoder(latent)[0])
    assert 20 < reached < 60  # 60 would be bf16


def test_says_what_it_cannot_run() -> None:
    assert unsupported_decoder(SMALL) is None
    assert unsupported_decoder(AutoencoderConfig()) is None
    odd = (
        replace(SMALL, decoder_layers_per_block=(0, 3, 1, 2)),
        replace(SMALL, decoder_block_out_channels=(48, 32, 64, 64)),
        replace(SMALL, upsample_block_type="pixel_shuffle"),
        replace(SMALL, decoder_block_types=("EfficientViTBlock", "ResBlock", "ResBlock", "ResBlock")),
    )
    for config in odd:
        assert unsupported_decoder(config)
