"""A transformer whose blocks run in C between their products equals the transformer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engines.backends.cpu.int8 import has_int8
from engines.backends.cpu.int8_products import int8_products
from engines.backends.cpu.kernels.library import Library
from engines.backends.cpu.packed_linear import Maps, PackedLinear, PlainLinear, exact_products, product_of
from engines.backends.cpu.transformer_block import CpuBlock, computes, replace_blocks
from engines.backends.parity import difference
from engines.models.lora import AdaptedTransformer, AdapterSelection, Factors, add_adapters
from engines.models.transformer import Block, SprintTransformer, TransformerConfig

# Heads of cross-attention of an odd size, as in the 0.6B: 2 x 72.
CONFIG = TransformerConfig(
    num_attention_heads=9,
    attention_head_dim=16,
    num_cross_attention_heads=2,
    cross_attention_head_dim=72,
    caption_channels=48,
    num_layers=2,
    mlp_ratio=2,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
)
CONFIGS = [CONFIG, replace(CONFIG, qk_norm=None, attention_bias=True)]
needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no 8-bit products (AVX512-VNNI)")


def transformer(config: TransformerConfig = CONFIG, dtype: torch.dtype = torch.float32) -> SprintTransformer:
    torch.manual_seed(0)
    module = SprintTransformer(config)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5))
    return module.eval().requires_grad_(False).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, CONFIG.in_channels, 6, 5), (1, 7, CONFIG.caption_channels), (1,), (1,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@torch.inference_mode()
def in_c(module: nn.Module, library: Library, dtype: torch.dtype = torch.float32) -> nn.Module:
    assert replace_blocks(module, library, exact_products(dtype))
    assert not any(isinstance(part, Block) for part in module.modules())
    return module


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("config", CONFIGS, ids=["norms", "biases"])
def test_equals_the_transformer(config: TransformerConfig, library: Library) -> None:
    expected = transformer(config)(*inputs())
    assert difference(expected, in_c(transformer(config), library)(*inputs())).sqnr_db > 100


def test_in_bf16_it_is_nearer_than_pytorchs_operations(library: Library) -> None:
    if exact_products(torch.bfloat16) is PlainLinear:
        pytest.skip("oneDNN has no bf16 on this CPU")
    exact = transformer(dtype=torch.bfloat16).double()(*(x.double() for x in inputs(torch.bfloat16)))
    plain = transformer(dtype=torch.bfloat16)(*inputs(torch.bfloat16))
    actual = in_c(transformer(dtype=torch.bfloat16), library, torch.bfloat16)(*inputs(torch.bfloat16))
    near = difference(exact, actual).sqnr_db
    assert near > 35
    assert near > difference(exact, plain).sqnr_db


def test_a_block_leaves_its_input_as_it_is(library: Library) -> None:
    module = transformer().transformer_blocks[0]
    assert isinstance(module, Block)
    block, x = CpuBlock(module, library, PlainLinear), torch.randn(1, 30, CONFIG.dim)
    text, modulation, before = torch.randn(1, 4, CONFIG.dim), torch.randn(1, 6, CONFIG.dim), x.clone()
    first = block(x, text, modulation, None, (6, 5))
    assert torch.equal(x, before)
    assert torch.equal(block(x, text, modulation, None, (6, 5)), first)


@needs_int8
def test_products_in_8_bits_are_near(library: Library) -> None:
    module = transformer()
    assert replace_blocks(module, library, int8_products(library))
    expected, actual = transformer()(*inputs()), module(*inputs())
    assert 25 < difference(expected, actual).sqnr_db < 50  # an exact result would not be in 8 bits


@pytest.mark.parametrize(
    "adapted", [("attn1.to_k", "ff.conv_inverted"), ("attn2.to_v", "attn1.to_out.0", "ff.conv_point")], ids=str
)
def test_adapters_of_a_request_apply(adapted: tuple[str, ...], library: Library) -> None:
    generator = torch.Generator().manual_seed(2)
    plain, factors = transformer(), {}
    for name in (f"transformer_blocks.1.{part}" for part in adapted):
        out, columns = plain.get_submodule(name).weight.shape[:2]  # type: ignore[union-attr, index]  # a map's
        factors[name] = Factors(torch.randn(3, columns, generator=generator), torch.randn(out, 3, generator=generator))
    expected = AdaptedTransformer(plain, add_adapters(plain, [factors]))
    module = transformer()
    actual = AdaptedTransformer(module, add_adapters(module, [factors]))
    in_c(module, library)
    chosen = AdapterSelection(torch.tensor([[0]]), torch.tensor([[0.3]]))
    with_adapter = expected(*inputs(), chosen=chosen)
    assert difference(with_adapter, actual(*inputs(), chosen=chosen)).sqnr_db > 90
    assert difference(expected(*inputs()), actual(*inputs())).sqnr_db > 90
    assert difference(with_adapter, actual(*inputs())).sqnr_db < 40


def test_offers_only_what_it_computes(library: Library) -> None:
    def block(config: TransformerConfig) -> Block:
        return Block(config)

    assert computes(block(CONFIG), library)
    assert not computes(block(CONFIG).half(), library)
    odd_heads = replace(CONFIG, num_attention_heads=16, attention_head_dim=9)
    assert not computes(block(odd_heads), library)
    assert not computes(nn.Linear(2, 2), library)
    assert not replace_blocks(nn.Sequential(block(odd_heads)), library, PlainLinear)


@pytest.mark.parametrize("make", [PackedLinear, PlainLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_maps_of_the_same_rows(make: type[PackedLinear], bias: bool) -> None:
    torch.manual_seed(0)
    maps, x = [nn.Linear(48, 32, bias=bias) for _ in range(3)], torch.randn(9, 48)
    for actual, one in zip(Maps(maps, make)(x), maps, strict=True):
        torch.testing.assert_close(actual, one(x), rtol=0, atol=1e-5)
    conv = nn.Conv2d(48, 32, 1, bias=bias)
    expected = conv(x.T.reshape(1, 48, 3, 3)).flatten(2)[0].T
    torch.testing.assert_close(product_of(conv, make)(x), expected, rtol=0, atol=1e-5)
