"""The transformer's maps in 8 bits are near the exact ones, token by token; a job does not depend on its batch."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.cpu import int8_products
from engines.backends.cpu.int8 import has_int8
from engines.backends.cpu.int8_products import PRODUCTS, Int8Linear, Int8Pointwise, rounded_rows
from engines.backends.eager import eager
from engines.backends.parity import difference
from engines.errors import ParityError
from engines.loader import load_engine
from engines.models.controlnet import ControlledTransformer, ControlNet
from engines.models.transformer import SprintTransformer, TransformerConfig
from engines.types import AdapterOption, Job

pytestmark = pytest.mark.skipif(not has_int8(), reason="this CPU has no 8-bit products (AVX512-VNNI)")

CONFIG = TransformerConfig(
    num_attention_heads=4,
    num_cross_attention_heads=4,
    cross_attention_head_dim=32,
    caption_channels=48,
    num_layers=3,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
)
MODELS = Path(__file__).resolve().parents[4] / "models"


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64, bias=bias).requires_grad_(False)


def tokens() -> Tensor:
    """Returns rows of different sizes, more than one slice of them."""
    rows = int8_products._SLICE_NUMEL // 96 + 40
    return torch.randn(1, rows, 96) * torch.logspace(-3, 3, rows)[None, :, None]


def test_rounds_to_the_nearest_level() -> None:
    levels = torch.linspace(-127, 127, 2033)  # eighths of a level, which fp32 holds exactly
    rows = (levels * 2.0**-7)[None]
    actual, scales = rounded_rows(torch.cat([rows, 4 * rows, torch.zeros_like(rows)]))
    assert scales.flatten()[:2].tolist() == [2.0**-7, 2.0**-5]
    assert actual[0].tolist() == actual[1].tolist() == [128 + round(level) for level in levels.tolist()]
    assert set(actual[2].tolist()) == {128}


@pytest.mark.parametrize("bias", [False, True])
def test_is_near_the_map_at_every_row(bias: bool) -> None:
    exact, converted, x = linear(bias=bias), Int8Linear(*_weights(linear(bias=bias))), tokens()
    expected, actual = exact(x), converted(x)
    assert actual.shape == expected.shape
    for first in range(0, x.shape[1], 200):
        rows = slice(first, first + 200)
        assert difference(expected[:, rows], actual[:, rows]).sqnr_db > 38


def _weights(exact: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return exact.weight, exact.bias


def test_a_row_does_not_depend_on_the_others() -> None:
    converted, x = Int8Linear(*_weights(linear())), tokens()
    together = converted(x)
    for row in (0, 7, x.shape[1] - 1):
        assert torch.equal(converted(x[:, row : row + 1]), together[:, row : row + 1])


def test_a_convolution_of_one_pixel_is_that_map() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 64, 1).requires_grad_(False)
    x = torch.randn(2, 96, 5, 7).contiguous(memory_format=torch.channels_last)
    actual = Int8Pointwise(conv)(x)
    assert difference(conv(x), actual).sqnr_db > 38
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_not_finite(odd: float) -> None:
    x = torch.randn(3, 96)
    x[1, 5] = odd
    actual = Int8Linear(*_weights(linear()))(x)
    assert not actual[1].isfinite().any()
    assert actual[[0, 2]].isfinite().all()


def test_nothing_but_zeros_gives_the_bias() -> None:
    exact = linear()
    actual = Int8Linear(*_weights(exact))(torch.zeros(2, 96))
    assert torch.equal(actual, exact.bias.expand(2, 64))


# --- the transformer --------------------------------------------------------------------------------------------------


def transformer() -> SprintTransformer:
    torch.manual_seed(0)
    return SprintTransformer(CONFIG).eval().requires_grad_(False)


def spec_of(name: ModuleName) -> ModuleSpec:
    return ModuleSpec(name, torch.float32, torch.device("cpu"), 4, int8=True)


def jobs(count: int, control: bool) -> Mapping[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(count, 9)
    mask[-1, 5:] = 0
    inputs = {
        "latent": torch.randn(count, CONFIG.in_channels, 6, 5),
        "text": torch.randn(count, 9, CONFIG.caption_channels),
        "timestep": torch.rand(count),
        "guidance": torch.rand(count),
        "text_mask": mask,
    }
    more = {"control": torch.randn_like(inputs["latent"]), "control_scale": torch.ones(count)}
    return inputs | (more if control else {})


@pytest.mark.parametrize("name", ["transformer", "controlled"])
def test_a_transformer_is_converted_and_a_job_is_the_same_in_a_batch(name: ModuleName) -> None:
    exact, module, control = transformer(), transformer(), name == "controlled"
    torch.manual_seed(2)
    controlnet = ControlNet.of(exact, 2)
    for projection in controlnet.controlnet_blocks:
        nn.init.normal_(projection.weight, std=0.05)  # type: ignore[arg-type]  # of a linear map
    spec, inputs = spec_of(name), jobs(3, control)
    with torch.inference_mode():
        expected = (ControlledTransformer(exact, controlnet) if control else exact)(**inputs)
        converted = eager(ControlledTransformer(module, controlnet) if control else module, spec)
        actual = converted(*inputs.values())
        alone = [converted(*(value[row : row + 1] for value in inputs.values())) for row in range(3)]
    assert 30 < difference(expected, actual).sqnr_db < 50  # an exact result would not be 8-bit
    assert torch.equal(torch.cat(alone), actual)
    blocks = 5 if control else 3
    assert spec.reasons[name] == f"{blocks * len(PRODUCTS)} products of image tokens in 8 bits, SQNR >= 25 dB"
    assert not {f"transformer_blocks.0.{product}.weight" for product in PRODUCTS} & module.state_dict().keys()


def test_a_transformer_that_8_bits_ruin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: 1.2 * exact(self, x))
    with pytest.raises(
        ParityError, match=r"transformer in int8: too far from its reference: SQNR .*, needed SQNR >= 25"
    ):
        eager(transformer(), spec_of("transformer"))


@pytest.mark.parametrize("products", [False, True])
def test_int8_converts_it_where_bf16_has_no_instructions(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.choice.has_bf16_products", lambda: products)
    engine = load_engine("tiny", precision="int8", device="cpu")
    assert ("products of image tokens" in engine.info.reasons.get("transformer", "")) != products


def test_adapters_of_a_request_keep_their_maps_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.choice.has_bf16_products", lambda: False)
    adapter = AdapterOption("diamond", str(MODELS / "lora" / "diamond.safetensors"))
    images = []
    for precision in ("fp32", "int8"):
        engine = load_engine("tiny", precision=precision, device="cpu", lora=(adapter,))
        width, height = engine.limits.default_size
        [image] = engine.generate([Job("a red diamond", 3, width, height, 1, lora=(("diamond", 1.0),))])
        images.append(torch.tensor(image.pixels))
    psnr = difference(images[0], images[1]).psnr_db
    assert psnr is not None
    assert 30 < psnr < 60
