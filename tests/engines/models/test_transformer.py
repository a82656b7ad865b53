"""Our transformer equals diffusers' with the same weights, and supports training and export."""

from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from small_checkpoint import SMALL_TRANSFORMER, randomise_weights
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.models.transformer import SPRINT_0_6B, SPRINT_1_6B, SprintTransformer, TransformerConfig

GATE = 1e-4  # largest error, relative to the output's largest value

SMALL = replace(SMALL_TRANSFORMER, out_channels=4, sample_size=8)


def pair(config: TransformerConfig) -> tuple[nn.Module, SprintTransformer]:
    """Returns upstream's model and ours with the same weights."""
    reference = randomise_weights(SanaTransformer2DModel.from_config(config.to_dict()))
    with torch.device("meta"):
        ours = SprintTransformer(config)
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    return reference, ours.eval()


def inputs(
    config: TransformerConfig, size: tuple[int, int], tokens: int = 7, batch: int = 2
) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return {
        "latent": torch.randn(batch, config.in_channels, *size),
        "text": torch.randn(batch, tokens, config.caption_channels),
        "timestep": torch.linspace(1, 0.4, batch),
        "guidance": torch.linspace(0.4, 0.5, batch) if config.guidance_embeds else None,
    }


@torch.no_grad()
def error(reference: nn.Module, ours: nn.Module, arguments: dict[str, Tensor | None], **more: object) -> float:
    expected = reference(
        arguments["latent"],
        encoder_hidden_states=arguments["text"],
        timestep=arguments["timestep"],
        guidance=arguments["guidance"],
        encoder_attention_mask=more.get("text_mask"),
        controlnet_block_samples=more.get("control"),
        return_dict=False,
    )[0]
    return float((ours(**arguments, **more) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("config", [SPRINT_0_6B, SPRINT_1_6B], ids=["0.6B", "1.6B"])
def test_two_blocks_at_true_width_equal_upstream(config: TransformerConfig) -> None:
    config = replace(config, num_layers=2)
    reference, ours = pair(config)
    assert error(reference, ours, inputs(config, (8, 8))) <= GATE


def test_tokens_keep_one_layout() -> None:
    """Sums take their first operand's layout; every norm of every block would copy transposed tokens."""
    _, ours = pair(SMALL)
    layouts: list[bool] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], x: Tensor) -> None:
        layouts.extend([arguments[0].is_contiguous(), x.is_contiguous()])

    for block in ours.transformer_blocks:
        block.register_forward_hook(note)
    ours(**inputs(SMALL, (8, 8)))
    assert layouts == [True] * 6


def test_no_part_can_be_left_out() -> None:
    reference, ours = pair(SMALL)
    arguments = inputs(SMALL, (8, 8))
    assert error(reference, ours, arguments) <= GATE
    parts = set()
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            continue
        original = parameter.data
        parameter.data = torch.zeros_like(original)
        assert error(reference, ours, arguments) > GATE, f"{name} does not matter"
        parameter.data = original
        parts.add(name.split(".")[0])
    assert parts >= {
        "patch_embed",
        "time_embed",
        "caption_projection",
        "caption_norm",
        "transformer_blocks",
        "proj_out",
    }


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, interpolation_scale=0.5),
        replace(SMALL, guidance_embeds=False, qk_norm=None),
        replace(SMALL, attention_bias=True, num_layers=1),
    ],
    ids=["sprint", "positions", "base", "bias"],
)
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_variants_and_sizes_equal_upstream(config: TransformerConfig, size: tuple[int, int]) -> None:
    reference, ours = pair(config)
    assert error(reference, ours, inputs(config, size)) <= GATE


def test_control_residuals_equal_upstream() -> None:
    reference, ours = pair(SMALL)
    control = [torch.randn(2, 64, SMALL.dim) for _ in range(2)]
    arguments = inputs(SMALL, (8, 8))
    assert error(reference, ours, arguments, control=control) <= GATE
    assert not torch.allclose(ours(**arguments, control=control), ours(**arguments))


def test_masked_text_equals_upstream_and_absent_text() -> None:
    reference, ours = pair(SMALL)
    arguments = inputs(SMALL, (8, 8))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    assert error(reference, ours, arguments, text_mask=mask) <= GATE
    masked = ours(**arguments, text_mask=mask)
    alone = ours(**{key: value[:1, :3] if key == "text" else value[:1] for key, value in arguments.items()})
    torch.testing.assert_close(masked[:1], alone, rtol=0, atol=1e-5)


def test_pieces_make_the_whole() -> None:
    _, ours = pair(SMALL)
    arguments = inputs(SMALL, (8, 8))
    modulation, embedded = ours.conditioning(arguments["timestep"], arguments["guidance"])
    assert modulation.shape == (2, 6, SMALL.dim)
    parts = ours.velocity(arguments["latent"], ours.project_text(arguments["text"]), modulation, embedded)
    torch.testing.assert_close(parts, ours(**arguments), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, inside jvp
def test_forward_derivative_equals_difference_quotient() -> None:
    _, ours = pair(SMALL)
    arguments = inputs(SMALL, (8, 8))
    ours.double()
    x, time, text, guidance = (arguments[key].double() for key in ("latent", "timestep", "text", "guidance"))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return ours(x, text, time, guidance)

    direction = (torch.randn_like(x), torch.ones_like(time))
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(velocity, (x, time), direction)
        step = 3e-4  # the fp32 parts of the network limit it
        ahead = velocity(x + step * direction[0], time + step)
        behind = velocity(x - step * direction[0], time - step)
    quotient = (ahead - behind) / (2 * step)
    # The median, because some steps cross the kink of the attention's ReLU.
    assert (tangent - quotient).abs().median() < 5e-3 * quotient.abs().median()
    assert tangent.requires_grad


def test_exports_with_batch_and_text_length_open() -> None:
    _, ours = pair(replace(SMALL, num_layers=1))
    arguments = inputs(SMALL, (8, 8))
    batch, tokens = torch.export.Dim("batch", min=1, max=16), torch.export.Dim("tokens", min=2, max=300)
    shapes = {"latent": {0: batch}, "text": {0: batch, 1: tokens}, "timestep": {0: batch}, "guidance": {0: batch}}
    exported = torch.export.export(ours, (), arguments, dynamic_shapes=shapes).module()
    other = inputs(SMALL, (8, 8), tokens=12, batch=5)
    torch.testing.assert_close(exported(**other), ours(**other))


@pytest.mark.parametrize(
    ("config", "parameters"), [(SPRINT_0_6B, 593_501_216), (SPRINT_1_6B, 1_610_237_472)], ids=["0.6B", "1.6B"]
)
def test_parameter_counts_are_the_published_ones(config: TransformerConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in SprintTransformer(config).parameters()) == parameters


@pytest.mark.parametrize("config", [SPRINT_0_6B, SPRINT_1_6B, replace(SMALL, interpolation_scale=2.0)])
def test_config_survives_the_round_trip_through_upstream(config: TransformerConfig) -> None:
    with torch.device("meta"):
        theirs = SanaTransformer2DModel.from_config(config.to_dict()).config
    assert TransformerConfig.from_dict(theirs) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qk_norm": "l2"}, "qk_norm"),
        ({"patch_size": 2}, "patch_size"),
        ({"dropout": 0.1}, "dropout"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"num_cross_attention_heads": 3}, "cross-attention width"),
        ({"cross_attention_dim": 64}, "cross_attention_dim"),
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"attention_head_dim": "32"}, "attention_head_dim"),
        ({"num_layers": True}, "num_layers"),
    ],
)
def test_unsupported_config_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TransformerConfig.from_dict({**SMALL.to_dict(), **change})


@pytest.mark.parametrize(("embeds", "guidance"), [(True, None), (False, torch.ones(2))])
def test_guidance_that_does_not_fit_is_an_error(embeds: bool, guidance: Tensor | None) -> None:
    _, ours = pair(replace(SMALL, guidance_embeds=embeds))
    with pytest.raises(ValueError, match="guidance"):
        ours(**{**inputs(SMALL, (8, 8)), "guidance": guidance})
