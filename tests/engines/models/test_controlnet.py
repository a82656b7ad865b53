"""The ControlNet equals diffusers' SanaControlNetModel, and NVlabs' graph of diffusers' blocks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from small_checkpoint import randomise_weights
from torch import Tensor, nn

from engines.models.controlnet import ControlConfig, ControlledTransformer, ControlNet, Injection
from engines.models.transformer import SPRINT_0_6B, SprintTransformer, TransformerConfig

GATE = 1e-4  # largest error, relative to the output's largest value

BASE_0_6B = replace(SPRINT_0_6B, guidance_embeds=False, qk_norm=None)  # the base model of diffusers' ControlNet
SMALL = replace(
    SPRINT_0_6B,
    num_attention_heads=2,
    attention_head_dim=16,
    num_cross_attention_heads=4,
    cross_attention_head_dim=8,
    num_layers=4,
    caption_channels=24,
    in_channels=4,
    out_channels=4,
    sample_size=8,
)
PLAIN_SMALL = replace(SMALL, guidance_embeds=False, qk_norm=None)


def upstream(config: TransformerConfig, copies: int) -> tuple[nn.Module, nn.Module]:
    """Returns diffusers' transformer and ControlNet with weights that all matter."""
    transformer = randomise_weights(SanaTransformer2DModel.from_config(config.to_dict()), 1)
    numbers = {key: value for key, value in replace(config, num_layers=copies).to_dict().items() if key[0] != "_"}
    for key in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):
        del numbers[key]
    return transformer, randomise_weights(SanaControlNetModel(**numbers), 2)


def ours(transformer: nn.Module, controlnet: nn.Module, injection: Injection) -> ControlledTransformer:
    config = TransformerConfig.from_dict(dict(transformer.config))
    control = ControlConfig.from_dict({**controlnet.config, "injection": injection})
    with torch.device("meta"):
        model = ControlledTransformer(SprintTransformer(config), ControlNet(control))
    model.transformer.load_state_dict(transformer.state_dict(), strict=True, assign=True)
    model.controlnet.load_state_dict(controlnet.state_dict(), strict=True, assign=True)
    return model.eval()


def inputs(
    config: TransformerConfig, size: tuple[int, int] = (8, 8), batch: int = 2, tokens: int = 7
) -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.ones(batch, tokens)
    mask[-1, tokens // 2 :] = 0
    return {
        "latent": torch.randn(batch, config.in_channels, *size),
        "text": torch.randn(batch, tokens, config.caption_channels),
        "timestep": torch.linspace(1, 0.4, batch),
        "guidance": torch.linspace(0.4, 0.5, batch) if config.guidance_embeds else None,
        "text_mask": mask,
        "control": torch.randn(batch, config.in_channels, *size),
        "control_scale": torch.linspace(0.5, 1.0, batch),
    }


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def diffusers_velocity(transformer: nn.Module, controlnet: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Runs diffusers job by job, because it has one scale per batch."""
    rows = []
    for row in range(len(arguments["latent"])):
        latent, text, time, mask, control, scale = (
            arguments[name][row : row + 1]
            for name in ("latent", "text", "timestep", "text_mask", "control", "control_scale")
        )
        samples = controlnet(latent, text, time, control, float(scale), mask, return_dict=False)[0]
        rows.append(
            transformer(
                latent,
                encoder_hidden_states=text,
                timestep=time,
                encoder_attention_mask=mask,
                controlnet_block_samples=tuple(samples),
                return_dict=False,
            )[0]
        )
    return torch.cat(rows)


def nvlabs_velocity(transformer: nn.Module, controlnet: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Runs the forward pass of NVlabs' SanaMSControlNet with diffusers' blocks."""
    latent, mask = arguments["latent"], arguments["text_mask"]
    batch, _, height, width = latent.shape
    bias = ((1 - mask) * -10000.0)[:, None, :]

    def prepared(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        time, embedded = model.time_embed(arguments["timestep"], batch_size=batch, hidden_dtype=latent.dtype)
        return model.caption_norm(model.caption_projection(arguments["text"])), time, embedded

    def run(block: nn.Module, x: Tensor, model: nn.Module) -> Tensor:
        text, time, _ = prepared(model)
        return block(x, None, text, bias, time, height, width)

    control = controlnet.patch_embed.proj(arguments["control"]).flatten(2).transpose(1, 2)
    blocks = transformer.transformer_blocks
    x = run(blocks[0], transformer.patch_embed(latent), transformer)
    for i, (copied, after) in enumerate(
        zip(controlnet.transformer_blocks, controlnet.controlnet_blocks, strict=True), start=1
    ):
        if i == 1:
            control = x + controlnet.input_block(control)
        control = run(copied, control, controlnet)
        x = run(blocks[i], x + arguments["control_scale"][:, None, None] * after(control), transformer)
    for block in blocks[len(controlnet.transformer_blocks) + 1 :]:
        x = run(block, x, transformer)
    x = transformer.proj_out(transformer.norm_out(x, prepared(transformer)[2], transformer.scale_shift_table))
    return x.transpose(1, 2).unflatten(2, (height, width))


@torch.no_grad()
@pytest.mark.parametrize("injection", ["diffusers", "nvlabs"])
def test_true_width_equals_upstream(injection: Injection) -> None:
    config = replace(BASE_0_6B, num_layers=3)
    reference = upstream(config, 2)
    arguments = inputs(config)
    expected = (diffusers_velocity if injection == "diffusers" else nvlabs_velocity)(*reference, arguments)
    assert distance(ours(*reference, injection)(**arguments), expected) <= GATE


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 1.0], ids=["no positions", "positions"])
def test_the_graphs_differ_and_both_equal_upstream(scale: float | None) -> None:
    config = replace(PLAIN_SMALL, interpolation_scale=scale)
    reference, arguments = upstream(config, 2), inputs(config, (6, 10))
    diffusers, nvlabs = diffusers_velocity(*reference, arguments), nvlabs_velocity(*reference, arguments)
    assert distance(ours(*reference, "diffusers")(**arguments), diffusers) <= GATE
    assert distance(ours(*reference, "nvlabs")(**arguments), nvlabs) <= GATE
    assert distance(diffusers, nvlabs) > 100 * GATE


def sprint(injection: Injection = "diffusers") -> ControlledTransformer:
    """Returns our model with guidance and QK-norm, which upstream's ControlNet lacks."""
    transformer = SprintTransformer(SMALL)
    randomise_weights(transformer, 1)
    return ControlledTransformer(transformer, ControlNet.of(transformer, 2, injection)).eval()


@torch.no_grad()
@pytest.mark.parametrize("injection", ["diffusers", "nvlabs"])
def test_an_untrained_controlnet_changes_nothing(injection: Injection) -> None:
    model, arguments = sprint(injection), inputs(SMALL)
    plain = {name: arguments[name] for name in ("latent", "text", "timestep", "guidance", "text_mask")}
    assert torch.equal(model(**arguments), model.transformer(**plain))


@torch.no_grad()
@pytest.mark.parametrize("injection", ["diffusers", "nvlabs"])
def test_scale_zero_is_no_control_and_each_job_has_its_own(injection: Injection) -> None:
    model, arguments = sprint(injection), inputs(SMALL)
    randomise_weights(model.controlnet, 3)
    plain = {name: arguments[name] for name in ("latent", "text", "timestep", "guidance", "text_mask")}
    without = model.transformer(**plain)
    actual = model(**{**arguments, "control_scale": torch.tensor([0.0, 1.0])})
    assert torch.equal(actual[0], without[0])
    assert distance(actual[1], without[1]) > 0.01


@torch.no_grad()
def test_guidance_and_every_weight_of_the_branch_matter() -> None:
    model, arguments = sprint(), inputs(SMALL)
    randomise_weights(model.controlnet, 3)
    expected = model(**arguments)
    for name, parameter in model.controlnet.named_parameters():
        original = parameter.data
        parameter.data = original + 0.1 * original.abs().mean() * torch.sign(torch.randn_like(original))
        changed = distance(model(**arguments), expected)
        parameter.data = original
        assert changed > 1e-6, name
    moved = {**arguments, "guidance": arguments["guidance"] + 0.3}
    alone = {name: moved[name] for name in ("latent", "text", "timestep", "guidance", "text_mask")}
    residual = model(**moved) - model.transformer(**alone)
    alone = {name: arguments[name] for name in ("latent", "text", "timestep", "guidance", "text_mask")}
    assert distance(residual, expected - model.transformer(**alone)) > 1e-3


def test_config_is_read_back_and_refuses_what_it_does_not_know() -> None:
    config = ControlConfig(replace(SMALL, num_layers=2), "nvlabs")
    assert ControlConfig.from_dict(config.to_dict()) == config
    assert ControlConfig.from_dict({}).copies.num_layers == 7
    with pytest.raises(ValueError, match="injection: got 'both', supported: diffusers, nvlabs"):
        ControlConfig.from_dict({"injection": "both"})
    with pytest.raises(ValueError, match="unknown key 'strength'"):
        ControlConfig.from_dict({"strength": 1})
