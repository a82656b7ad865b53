"""The GPU's transformer equals the module, by references on the CPU and by kernels in the interpreter."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from small_checkpoint import SMALL_TRANSFORMER, randomise_weights
from torch import Tensor

from engines.backends.cuda.blocks import FP8_PRODUCTS, lengths_of
from engines.backends.cuda.controlled import CudaControlled
from engines.backends.cuda.transformer import CudaTransformer
from engines.errors import BackendError
from engines.kernels.op import Launcher, Ops, sqnr_db
from engines.models.controlnet import ControlledTransformer, ControlNet, Injection
from engines.models.transformer import SPRINT_0_6B, SprintTransformer, TransformerConfig
from engines.pipeline.native import PRODUCT_SQNR_DB

WIDE = replace(
    SMALL_TRANSFORMER,
    num_attention_heads=5,
    attention_head_dim=32,
    num_cross_attention_heads=5,
    cross_attention_head_dim=32,
)
KINDS = {
    "small": SMALL_TRANSFORMER,
    "160 wide": WIDE,
    "positions": replace(SMALL_TRANSFORMER, interpolation_scale=1.0),
    "attention bias": replace(SMALL_TRANSFORMER, attention_bias=True),
    "no norm of q and k, no guidance": replace(SMALL_TRANSFORMER, qk_norm=None, guidance_embeds=False),
}


def make_transformer(config: TransformerConfig) -> SprintTransformer:
    """Returns a transformer with weights that all matter, including negative norm weights."""
    torch.manual_seed(0)
    transformer: SprintTransformer = randomise_weights(SprintTransformer(config))
    for name, weight in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            torch.nn.init.normal_(weight)
    return transformer.eval().requires_grad_(False)


def inputs(config: TransformerConfig, size: tuple[int, int], batch: int, text: int = 6) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(batch, config.in_channels, *size, generator=generator),
        "text": torch.randn(batch, text, config.caption_channels, generator=generator),
        "timestep": torch.linspace(1, 0.4, batch),
        "guidance": torch.linspace(0.4, 0.5, batch) if config.guidance_embeds else None,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "batch"), [((4, 4), 1), ((3, 5), 3)])
def test_equals_the_module(kind: str, size: tuple[int, int], batch: int) -> None:
    config = KINDS[kind]
    transformer, arguments = make_transformer(config), inputs(config, size, batch)
    expected = copy.deepcopy(transformer)(**arguments)
    fast = CudaTransformer(transformer, Ops(None))
    actual = fast(**arguments)
    assert actual.shape == (batch, 6, *size)
    assert sqnr_db(expected, actual) > 90
    assert sqnr_db(expected, transformer(**arguments)) > 90  # its parameters are now views


def test_masked_text_is_not_seen_and_a_prompt_is_prepared_once() -> None:
    transformer, arguments = make_transformer(SMALL_TRANSFORMER), inputs(SMALL_TRANSFORMER, (4, 3), 3)
    mask = torch.arange(6)[None] < torch.tensor([[2], [6], [1]])
    expected = transformer(**arguments, text_mask=mask)
    fast = CudaTransformer(transformer, Ops(None))
    assert sqnr_db(expected, fast(**arguments, text_mask=mask)) > 90
    prepared = fast.prepare(arguments["text"], lengths_of(arguments["text"], mask))
    for time in (arguments["timestep"], arguments["timestep"] / 2):
        expected = transformer(arguments["latent"], arguments["text"], time, arguments["guidance"], mask)
        assert sqnr_db(expected, fast.velocity(arguments["latent"], prepared, time, arguments["guidance"])) > 90


def test_residuals_go_where_the_module_adds_them() -> None:
    transformer, arguments = make_transformer(SMALL_TRANSFORMER), inputs(SMALL_TRANSFORMER, (3, 5), 2)
    residuals = list(torch.randn(2, 2, 15, 32, generator=torch.Generator().manual_seed(3)))
    expected = transformer(**arguments, control=residuals)
    fast = CudaTransformer(transformer, Ops(None))
    prepared = fast.prepare(arguments["text"], lengths_of(arguments["text"], None))
    actual = fast.velocity(arguments["latent"], prepared, arguments["timestep"], arguments["guidance"], residuals)
    assert sqnr_db(expected, actual) > 90


def controlled(injection: Injection, config: TransformerConfig) -> ControlledTransformer:
    transformer = make_transformer(config)
    net = ControlNet.of(transformer, 2, injection)
    return ControlledTransformer(transformer, randomise_weights(net)).eval().requires_grad_(False)


@pytest.mark.parametrize("injection", ["diffusers", "nvlabs"])
@pytest.mark.parametrize("kind", ["small", "positions", "no norm of q and k, no guidance"])
def test_controlled_equals_the_module(injection: Injection, kind: str) -> None:
    config = KINDS[kind]
    module, arguments = controlled(injection, config), inputs(config, (3, 5), 3)
    mask = torch.arange(6)[None] < torch.tensor([[2], [6], [1]])
    control = torch.randn(3, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    more = {"text_mask": mask, "control": control, "control_scale": torch.tensor([1.0, 0.0, 0.5])}
    expected = module(**arguments, **more)
    plain = module.transformer(**arguments, text_mask=mask)
    fast = CudaControlled(module, Ops(None))
    actual = fast(**arguments, **more)
    assert sqnr_db(expected, actual) > 90
    assert torch.equal(actual[1], fast.base(**arguments, text_mask=mask)[1])
    assert sqnr_db(plain, actual) < 60


@pytest.mark.parametrize("kind", ["small", "no norm of q and k, no guidance"])
def test_kernels_give_the_same(kind: str) -> None:
    config = replace(KINDS[kind], num_layers=2)
    transformer, arguments = make_transformer(config), inputs(config, (2, 3), 2)
    mask = torch.arange(6)[None] < torch.tensor([[6], [3]])
    expected = transformer(**arguments, text_mask=mask)
    ops = Ops(Launcher(tma=False, processors=3))
    fast = CudaTransformer(transformer, ops)
    assert sqnr_db(expected, fast(**arguments, text_mask=mask)) > 90
    ops.compare(lambda: fast(**arguments, text_mask=mask))
    assert not ops.replaced


def test_guidance_is_needed_where_it_is_embedded_and_refused_where_not() -> None:
    for kind, arguments in (("small", None), ("no norm of q and k, no guidance", torch.ones(1))):
        fast = CudaTransformer(make_transformer(KINDS[kind]), Ops(None))
        with pytest.raises(ValueError, match="guidance"):
            fast(**{**inputs(KINDS[kind], (2, 2), 1), "guidance": arguments})


def test_other_types_are_refused() -> None:
    with pytest.raises(BackendError, match="float16"):
        CudaTransformer(make_transformer(SMALL_TRANSFORMER).half(), Ops(None))


def test_weights_are_not_kept_twice() -> None:
    transformer = make_transformer(SMALL_TRANSFORMER)
    fast = CudaTransformer(transformer, Ops(None))
    block = transformer.transformer_blocks[1]
    stacked = fast.blocks.keys_values.weight
    for layer in (block.attn2.to_k, block.attn2.to_v):
        assert layer.weight.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert block.attn1.to_q.weight.untyped_storage().data_ptr() == block.attn1.to_v.weight.untyped_storage().data_ptr()


def in_fp8(config: TransformerConfig, arguments: dict[str, Tensor | None], ops: Ops) -> CudaTransformer:
    """Returns a transformer in 8 bits, calibrated by these arguments."""
    fast = CudaTransformer(make_transformer(config).bfloat16(), ops)
    fast.blocks.calibrates = True
    fast(**arguments)
    fast.blocks.calibrates = False
    fast.to_fp8()
    return fast


@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_stay_near(kind: str) -> None:
    config = KINDS[kind]
    arguments = inputs(config, (4, 4), 3)
    exact, narrow = (
        CudaTransformer(make_transformer(config).bfloat16(), Ops(None)),
        in_fp8(config, arguments, Ops(None)),
    )
    assert all(min(row) > 0 for row in narrow.blocks.ranges)
    expected, actual = exact(**arguments), narrow(**arguments)
    assert 20 < sqnr_db(expected, actual) < 40  # 40 would be bf16
    alone = narrow(**{name: value if value is None else value[1:2] for name, value in arguments.items()})
    assert sqnr_db(actual[1:2], alone) > 45  # scales do not depend on the batch; sums in bf16 do


@pytest.mark.parametrize(
    ("config", "least"),
    [(SMALL_TRANSFORMER, 22), (replace(SPRINT_0_6B, num_layers=2), PRODUCT_SQNR_DB)],
    ids=["small", "published width"],
)
def test_each_product_in_8_bits_alone_is_near_and_all_are_as_far_as_their_errors_together(
    config: TransformerConfig, least: float
) -> None:
    arguments = inputs(config, (4, 4), 2)
    fast = CudaTransformer(make_transformer(config).bfloat16(), Ops(None))
    fast.blocks.calibrates = True
    exact = fast(**arguments)
    fast.blocks.calibrates = False
    alone = {}
    for product in FP8_PRODUCTS:
        with fast.blocks.one_in_fp8(product):
            alone[product] = sqnr_db(exact, fast(**arguments))
        assert torch.equal(fast(**arguments), exact), "nothing stays in 8 bits"
    assert all(least < db < 60 for db in alone.values()), alone
    fast.to_fp8()
    together = -10 * math.log10(sum(10 ** (-db / 10) for db in alone.values()))
    assert sqnr_db(exact, fast(**arguments)) == pytest.approx(together, abs=3)


def test_a_product_that_is_left_out_stays_in_bf16() -> None:
    arguments = inputs(SMALL_TRANSFORMER, (4, 4), 2)
    exact, fast = (CudaTransformer(make_transformer(SMALL_TRANSFORMER).bfloat16(), Ops(None)) for _ in range(2))
    fast.blocks.include_ranges(in_fp8(SMALL_TRANSFORMER, arguments, Ops(None)).blocks.ranges)
    for product in FP8_PRODUCTS:
        fast.blocks.leave_in_bf16(product)
    ranges = json.loads(json.dumps(fast.blocks.ranges))  # as native.json holds them
    again = CudaTransformer(make_transformer(SMALL_TRANSFORMER).bfloat16(), Ops(None))
    again.blocks.include_ranges(ranges)
    again.to_fp8()
    assert torch.equal(again(**arguments), exact(**arguments))


def test_8_bits_by_kernels_give_the_same() -> None:
    config = replace(SMALL_TRANSFORMER, num_layers=2)
    arguments = inputs(config, (2, 3), 2)
    expected = in_fp8(config, arguments, Ops(None))(**arguments)
    ops = Ops(Launcher(tma=False, processors=3))
    actual = in_fp8(config, arguments, ops)(**arguments)
    assert sqnr_db(expected, actual) > 15  # the interpreter loses a carry where it rounds to e4m3


def test_8_bits_give_up_the_modules_weights() -> None:
    arguments = inputs(SMALL_TRANSFORMER, (4, 4), 1)
    narrow = in_fp8(SMALL_TRANSFORMER, arguments, Ops(None))
    with pytest.raises(AttributeError, match="transformer_blocks"):
        narrow._module(**{name: value.bfloat16() for name, value in arguments.items() if value is not None})


def test_other_ranges_extend_those_of_a_calibration() -> None:
    arguments = inputs(SMALL_TRANSFORMER, (4, 4), 1)
    ranges = in_fp8(SMALL_TRANSFORMER, arguments, Ops(None)).blocks.ranges
    again = CudaTransformer(make_transformer(SMALL_TRANSFORMER).bfloat16(), Ops(None))
    again.blocks.include_ranges(ranges)
    again.blocks.include_ranges([[0.0] * len(row) for row in ranges])
    assert again.blocks.ranges == ranges
    again.to_fp8()
    assert torch.equal(again(**arguments), in_fp8(SMALL_TRANSFORMER, arguments, Ops(None))(**arguments))


@pytest.mark.parametrize("injection", ["diffusers", "nvlabs"])
def test_a_drawing_joins_blocks_of_8_bits(injection: Injection) -> None:
    module, arguments = controlled(injection, SMALL_TRANSFORMER).bfloat16(), inputs(SMALL_TRANSFORMER, (3, 5), 2)
    control = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    more = {"text_mask": None, "control": control, "control_scale": torch.tensor([1.0, 0.5])}
    fast = CudaControlled(module, Ops(None))
    fast.base.blocks.calibrates = True
    expected, plain = fast(**arguments, **more), fast.base(**arguments)
    fast.base.blocks.calibrates = False
    fast.base.to_fp8()
    actual = fast(**arguments, **more)
    assert 18 < sqnr_db(expected, actual) < 40
    assert sqnr_db(plain, actual) < 15
