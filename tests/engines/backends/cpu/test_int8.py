"""8-bit convolutions are near the exact ones, independent of the batch, and keep values that are not finite visible."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engines import loader
from engines.backends.base import ModuleSpec
from engines.backends.cpu.decoder import CpuDecoder
from engines.backends.cpu.int8 import Int8Conv, has_int8, quantised
from engines.backends.cpu.onednn_steps import IN_8_BITS
from engines.backends.parity import difference
from engines.errors import BackendError, ParityError
from engines.loader import load_engine
from engines.models.dcae import AutoencoderConfig, Decoder
from engines.types import Job

pytestmark = pytest.mark.skipif(not has_int8(), reason="this CPU has no 8-bit products (AVX512-VNNI)")

WIDE = AutoencoderConfig(
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_out_channels=(128, 256, 256),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
)


def seeded_conv(kernel: int, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(64, 96, kernel, padding=kernel // 2, bias=bias).requires_grad_(False)


def activations(count: int = 1) -> torch.Tensor:
    """Returns mostly positive values, as after SiLU, so that zero is far from the middle of their range."""
    return (torch.randn(count, 64, 12, 20) + 1.5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("zero", [0, 1, 100, 254])
def test_rounds_to_the_nearest_level(zero: int) -> None:
    """Covers half a level below the lowest, which a rounded zero point needs, to the highest; halves round to even."""
    scale = 2.0**-7
    levels = torch.linspace(-0.5, 254.5, 2041)  # eighths of a level, which fp32 holds exactly
    actual = quantised(((levels - zero) * scale).view(1, 1, -1, 1), scale, zero, (1, 2)).flatten()
    assert actual.tolist() == [zero, *(round(level) for level in levels.tolist()), zero, zero]


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("silu", [False, True])
def test_is_near_the_convolution_up_to_its_edges(kernel: int, silu: bool) -> None:
    conv = seeded_conv(kernel)
    x = activations()
    exact = nn.functional.silu(conv(x)) if silu else conv(x)
    actual = Int8Conv(conv, silu=silu)(x)
    assert actual.shape == exact.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert difference(exact, actual).sqnr_db > 35
    assert difference(exact[:, :, 0], actual[:, :, 0]).sqnr_db > 35  # padded by zeros, which are not 0 in 8 bits


def test_an_image_does_not_depend_on_its_batch() -> None:
    conv = Int8Conv(seeded_conv(3, bias=False))
    x = activations(3) * torch.tensor([1.0, 50.0, 0.01])[:, None, None, None]
    together = conv(x)
    for index in range(3):
        assert torch.equal(together[index : index + 1], conv(x[index : index + 1]))


def test_nothing_but_zeros_gives_the_bias() -> None:
    conv = seeded_conv(3)
    assert conv.bias is not None
    actual = Int8Conv(conv)(torch.zeros(1, 64, 4, 4))
    torch.testing.assert_close(actual, conv.bias[None, :, None, None].expand(1, 96, 4, 4))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_not_finite(odd: float) -> None:
    x = activations()
    x[0, 5, 3, 3] = odd
    assert Int8Conv(seeded_conv(3))(x).isnan().all()


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_strips_join_into_the_image(kernel: int) -> None:
    """Each strip has its neighbours and its own scale; a kernel of two rows computes one more row at the end."""
    conv = seeded_conv(kernel)
    x, halo = activations(), kernel // 2
    converted = Int8Conv(conv)
    upper = converted(x[:, :, : 5 + halo].contiguous(memory_format=torch.channels_last), (halo, 0))
    lower = converted(x[:, :, 5 - halo :].contiguous(memory_format=torch.channels_last), (0, halo))
    actual = torch.cat([upper[:, :, :5], lower], dim=2)
    assert difference(conv(x), actual).sqnr_db > 35


@pytest.mark.parametrize("numbers", [2**23, 2**13])
@pytest.mark.parametrize("upsampling", ["interpolate", "pixel_shuffle"])
def test_a_decoder_keeps_its_shortcuts_exact(upsampling: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.cpu.convolution.STRIP_NUMEL", numbers)
    config = AutoencoderConfig.from_dict({**WIDE.to_dict(), "upsample_block_type": upsampling})
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    latent = torch.randn(1, config.latent_channels, 6, 5)
    assert difference(decoder(latent), CpuDecoder(decoder, IN_8_BITS)(latent)).sqnr_db > 25


def test_the_shipped_checkpoint_keeps_its_images() -> None:
    prompts = ["two purple circles to the left of a green triangle on a black background", "a red square"]
    images = []
    for precision in ("fp32", "int8"):
        engine = load_engine("tiny", precision=precision, device="cpu")
        assert engine.info.precision == precision
        width, height = engine.limits.default_size
        converted = engine.generate([Job(prompt, seed, width, height, 1) for seed, prompt in enumerate(prompts)])
        images.append(torch.stack([torch.tensor(image.pixels) for image in converted]))
    actual = difference(images[0], images[1]).psnr_db
    assert actual is not None
    assert 35 < actual < 60  # an exact result would not be 8-bit


@pytest.mark.parametrize(
    ("precision", "products", "dtype", "told"),
    [
        ("int8", True, torch.bfloat16, "asked for"),
        ("int8", False, torch.float32, "what is not in 8 bits is in fp32"),
        ("bf16", False, torch.bfloat16, "slow here"),
        ("fp32", False, torch.float32, "asked for"),
    ],
)
def test_emulated_products_of_bf16_are_avoided_or_told(
    monkeypatch: pytest.MonkeyPatch, precision: str, products: bool, dtype: torch.dtype, told: str
) -> None:
    monkeypatch.setattr("engines.backends.choice.has_bf16_products", lambda: products)
    seen: list[torch.dtype] = []

    def eager(module: nn.Module, spec: ModuleSpec) -> nn.Module:
        seen.extend(parameter.dtype for parameter in module.parameters())
        assert spec.dtype == dtype
        return backend(module, spec)

    backend = loader.BACKENDS["eager"]
    monkeypatch.setattr(loader, "BACKENDS", {**loader.BACKENDS, "eager": eager})
    engine = load_engine("tiny", precision=precision, device="cpu")
    assert set(seen) == {dtype}
    assert told in engine.info.reasons["precision"]
    assert ("bf16 products" in engine.info.reasons["precision"]) == (precision != "fp32" and not products)


def test_a_decoder_that_8_bits_ruin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bent(self: Int8Conv, x: torch.Tensor, edges: tuple[int, int] | None = None) -> torch.Tensor:
        return 1.2 * exact(self, x, edges)

    exact = Int8Conv.__call__
    monkeypatch.setattr(Int8Conv, "__call__", bent)
    with pytest.raises(
        ParityError, match=r"decoder in int8: too far from its reference: PSNR is .*, needed PSNR >= 30"
    ):
        load_engine("tiny", precision="int8", device="cpu")


def test_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"int8 is the eager backend's on a CPU, and this is compiled on cpu; use bf16"
    ):
        load_engine("tiny", precision="int8", device="cpu", backend="compiled", cache=str(tmp_path))
    monkeypatch.setattr("engines.backends.eager.has_int8", lambda: False)
    with pytest.raises(BackendError, match=r"int8 needs a CPU with 8-bit products .*; use bf16"):
        load_engine("tiny", precision="int8", device="cpu")
