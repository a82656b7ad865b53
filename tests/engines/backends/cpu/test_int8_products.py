"""The transformer's maps in 8 bits are near the exact ones, token by token; a job does not depend on its batch."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.backends.base import ModuleName, ModuleSpec
from engines.backends.choice import has_bf16_products
from engines.backends.cpu import int8_products
from engines.backends.cpu.int8 import has_int8
from engines.backends.cpu.int8_products import (
    PRODUCTS,
    Int8Linear,
    Int8Pointwise,
    LastRounding,
    faster_in_8_bits,
    rounded_rows,
)
from engines.backends.cpu.timings import Timings
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
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not has_bf16_products(), reason="this CPU has no bf16 products")
    ),
]
MODELS = Path(__file__).resolve().parents[4] / "models"


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes 8 bits the faster ones."""
    choose("8 bits", monkeypatch)


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a way of computing the faster one."""
    monkeypatch.setattr(Timings, "of", lambda _, __, ways, ___: {one: 1.0 + (one != way) for one in ways})


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64, bias=bias, dtype=dtype).requires_grad_(False)


def converted_linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> Int8Linear:
    exact = linear(bias=bias, dtype=dtype)
    return Int8Linear(exact.weight, exact.bias, LastRounding())


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns rows of different sizes, more than one slice of them."""
    rows = int8_products._SLICE_NUMEL // 96 + 40
    return (torch.randn(1, rows, 96) * torch.logspace(-3, 3, rows)[None, :, None]).to(dtype)


def test_rounds_to_the_nearest_level() -> None:
    levels = torch.linspace(-127, 127, 2033)  # eighths of a level, which fp32 holds exactly
    rows = (levels * 2.0**-7)[None]
    actual, scales = rounded_rows(torch.cat([rows, 4 * rows, torch.zeros_like(rows)]))
    assert scales.flatten()[:2].tolist() == [2.0**-7, 2.0**-5]
    assert actual[0].tolist() == actual[1].tolist() == [128 + round(level) for level in levels.tolist()]
    assert set(actual[2].tolist()) == {128}


def test_levels_fit_the_scales_as_bf16_rounds_them() -> None:
    x = torch.randn(1, 96).to(torch.bfloat16).abs()
    x[0, 0] = 1.0
    rows = x * torch.linspace(1, 4, 999)[:, None].to(torch.bfloat16)
    levels, scales = rounded_rows(rows)
    assert scales.dtype == torch.bfloat16
    assert int(levels.min()) >= 128
    assert difference(rows.float(), (levels.float() - 128) * scales.float()).sqnr_db > 38


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_is_near_the_map_at_every_row(bias: bool, dtype: torch.dtype) -> None:
    exact, converted, x = (
        linear(bias=bias, dtype=dtype).float(),
        converted_linear(bias=bias, dtype=dtype),
        tokens(dtype),
    )
    expected, actual = exact(x.float()), converted(x)
    assert (actual.shape, actual.dtype) == (expected.shape, dtype)
    for first in range(0, x.shape[1], 200):
        rows = slice(first, first + 200)
        assert difference(expected[:, rows], actual[:, rows]).sqnr_db > 38


def test_maps_of_one_tensor_round_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[Tensor] = []
    monkeypatch.setattr(int8_products, "rounded_rows", lambda x: rounded.append(x) or rounded_rows(x))
    shared, exact, x = LastRounding(), linear(), tokens()
    query, key = (Int8Linear(weight, None, shared) for weight in (exact.weight, exact.weight.flip(0)))
    first, second = query(x), key(x)
    assert len(rounded) == 1
    assert torch.equal(first, second.flip(2))
    assert not torch.equal(query(2 * x), first)
    assert len(rounded) == 2


def test_a_row_does_not_depend_on_the_others() -> None:
    converted, x = converted_linear(), tokens()
    together = converted(x)
    for row in (0, 7, x.shape[1] - 1):
        assert torch.equal(converted(x[:, row : row + 1]), together[:, row : row + 1])


def test_a_convolution_of_one_pixel_is_that_map() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 64, 1).requires_grad_(False)
    x = torch.randn(2, 96, 5, 7).contiguous(memory_format=torch.channels_last)
    actual = Int8Pointwise(conv, LastRounding())(x)
    assert difference(conv(x), actual).sqnr_db > 38
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_not_finite(odd: float) -> None:
    x = torch.randn(3, 96)
    x[1, 5] = odd
    actual = converted_linear()(x)
    assert not actual[1].isfinite().any()
    assert actual[[0, 2]].isfinite().all()


def test_nothing_but_zeros_gives_the_bias() -> None:
    exact = linear()
    actual = Int8Linear(exact.weight, exact.bias, LastRounding())(torch.zeros(2, 96))
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


@pytest.mark.usefixtures("gains")
@pytest.mark.parametrize("in_c", [True, False], ids=["C", "no compiler"])
@pytest.mark.parametrize("name", ["transformer", "controlled"])
def test_a_transformer_is_converted_and_a_job_is_the_same_in_a_batch(
    name: ModuleName, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_c:
        monkeypatch.setattr("engines.backends.eager.load_library", lambda _: None)
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
    assert spec.reasons[name] == "products of image tokens in 8 bits, SQNR >= 25 dB"
    assert not {f"transformer_blocks.0.{product}.weight" for product in PRODUCTS} & module.state_dict().keys()


@pytest.mark.usefixtures("gains")
def test_a_transformer_that_8_bits_ruin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: 1.2 * exact(self, x))
    with pytest.raises(
        ParityError, match=r"transformer in int8: too far from its reference: SQNR .*, needed SQNR >= 25"
    ):
        eager(transformer(), spec_of("transformer"))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("way", ["8 bits", "exact"])
def test_int8_converts_it_where_8_bits_are_faster(way: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.choice.has_bf16_products", lambda: products)
    choose(way, monkeypatch)
    engine = load_engine("tiny", precision="int8", device="cpu")
    reason = engine.info.reasons["transformer"]
    assert ("products of image tokens" in reason, "gain little" in reason) == (way == "8 bits", way != "8 bits")
    width, height = engine.limits.default_size
    [image] = engine.generate([Job("a red circle", 3, width, height, 1)])
    assert 20 < image.pixels.mean() < 240


def test_a_measurement_is_kept(tmp_path: Path) -> None:
    first = faster_in_8_bits(CONFIG, torch.float32, Timings(tmp_path))
    assert first == faster_in_8_bits(CONFIG, torch.float32, Timings(tmp_path))
    assert "8 bits " in first[1]
    assert ", float32 " in first[1]


@pytest.mark.usefixtures("gains")
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
