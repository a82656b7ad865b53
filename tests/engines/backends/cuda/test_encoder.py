"""The encoder of a GPU, by its references on a CPU, against the PyTorch module."""

from dataclasses import replace

import pytest
import torch
from small_checkpoint import KERNEL_AUTOENCODER, randomise_weights

from engines.backends.cuda.encoder import CudaEncoder, why_not_encode
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.pixels import PixelEncoder

SMALL = replace(KERNEL_AUTOENCODER, encoder_block_out_channels=(32, 64, 64, 128), encoder_layers_per_block=(2, 1, 1, 2))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("ops", "size"), [(Ops(None), (48, 40)), (Ops(Launcher(False, 3)), (16, 8))], ids=["references", "kernels"]
)
def test_equals_the_module(ops: Ops, size: tuple[int, int]) -> None:
    made = randomise_weights(Autoencoder(SMALL))
    assert isinstance(made, Autoencoder)
    module = PixelEncoder(made)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = module(pixels)
    found = CudaEncoder(module, ops)(pixels)
    assert found.dtype == torch.float32
    assert sqnr_db(expected, found) > 80


def test_says_what_it_cannot_run() -> None:
    assert why_not_encode(SMALL) is None
    assert why_not_encode(AutoencoderConfig()) is None
    for config in (
        replace(SMALL, encoder_layers_per_block=(0, 1, 1, 2)),
        replace(SMALL, downsample_block_type="pixel_unshuffle"),
        replace(SMALL, encoder_block_out_channels=(48, 64, 64, 128)),
    ):
        assert why_not_encode(config)
