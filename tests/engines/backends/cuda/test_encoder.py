"""The GPU encoder, by references on a CPU, equals the PyTorch module."""

from dataclasses import replace

import pytest
import torch
from small_checkpoint import KERNEL_AUTOENCODER, randomise_weights

from engines.backends.cuda.encoder import CudaEncoder, unsupported_encoder
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.pixels import PixelEncoder

SMALL = replace(KERNEL_AUTOENCODER, encoder_block_out_channels=(32, 64, 64, 128), encoder_layers_per_block=(2, 1, 1, 2))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("ops", "size"), [(Ops(None), (48, 40)), (Ops(Launcher(False, 3)), (16, 8))], ids=["references", "kernels"]
)
def test_equals_the_module(ops: Ops, size: tuple[int, int]) -> None:
    autoencoder = randomise_weights(Autoencoder(SMALL))
    assert isinstance(autoencoder, Autoencoder)
    module = PixelEncoder(autoencoder)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = module(pixels)
    actual = CudaEncoder(module, ops)(pixels)
    assert actual.dtype == torch.float32
    assert sqnr_db(expected, actual) > 80


def test_says_what_it_cannot_run() -> None:
    assert unsupported_encoder(SMALL) is None
    assert unsupported_encoder(AutoencoderConfig()) is None
    for config in (
        replace(SMALL, encoder_layers_per_block=(0, 1, 1, 2)),
        replace(SMALL, downsample_block_type="pixel_unshuffle"),
        replace(SMALL, encoder_block_out_channels=(48, 64, 64, 128)),
    ):
        assert unsupported_encoder(config)
