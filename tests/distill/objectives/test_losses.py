"""sCM and LADD losses against worked cases and finite differences."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.objectives import losses
from distill.objectives.trigflow import Velocity, as_flow, as_trigflow, flow_times, guided, sample_flow
from engines.models.transformer import SPRINT_0_6B, SprintTransformer, TransformerConfig
from engines.sampler import mix


def small_transformer() -> SprintTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        caption_channels=16,
        sample_size=4,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    return with_modulation(SprintTransformer(config)).eval()


def with_modulation(model: SprintTransformer) -> SprintTransformer:
    """Sets modulation tables of unit size, so that every module of a block matters."""
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name:
            torch.nn.init.normal_(parameter)
    return model


def velocity_of(model: SprintTransformer, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: model(x, text, t, torch.full_like(t, 0.45))


def sample_trigflow(trig: Velocity, noise: Tensor, steps: int, shift: float) -> Tensor:
    """Integrates by DDIM in TrigFlow coordinates at the angles of `sample_flow`'s times: the same path."""
    times = flow_times(steps, shift)
    x = noise
    for now, then in pairwise(torch.atan2(times, 1 - times)):
        angle = now.expand(len(x))
        prediction = trig(x, angle)
        clean, direction = now.cos() * x - now.sin() * prediction, now.sin() * x + now.cos() * prediction
        x = mix(clean, direction, then.expand(len(x)))
    return x


def test_flow_and_trigflow_sampling_give_the_same_image() -> None:
    model = small_transformer()
    velocity = velocity_of(model, torch.randn(2, 5, 16))
    noise = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        flow = sample_flow(velocity, noise, steps=20, shift=2.0)
        trig = sample_trigflow(as_trigflow(velocity), noise, steps=20, shift=2.0)
    assert (flow - trig).abs().max() <= 1e-4 * flow.abs().max()
    assert (flow - noise).abs().max() > 0.1


def test_the_wrap_is_undone_by_its_inverse() -> None:
    velocity = velocity_of(small_transformer(), torch.randn(2, 5, 16))
    x, t = torch.randn(2, 8, 4, 4), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.allclose(as_flow(as_trigflow(velocity))(x, t), velocity(x, t), atol=1e-4)


def test_guidance_is_linear_between_its_networks() -> None:
    def without(x: Tensor, _: Tensor) -> Tensor:
        return x

    def with_text(x: Tensor, _: Tensor) -> Tensor:
        return x + 1

    x, t = torch.zeros(2, 1, 1, 1), torch.zeros(2)
    assert guided(with_text, without, 3.0)(x, t).flatten().tolist() == [3.0, 3.0]
    assert guided(with_text, without, torch.tensor([1.0, 4.5]))(x, t).flatten().tolist() == [1.0, 4.5]


@pytest.mark.parametrize("angle", [0.3, 0.9, 1.4])
def test_jvp_of_the_wrapped_transformer_equals_central_differences(angle: float) -> None:
    assert jvp_error(small_transformer(), angle, 1e-3, side=4) <= 1e-3


@pytest.mark.slow
def test_jvp_at_true_width_in_float32() -> None:
    """Paper algorithm 2 needs the tangent of the real transformer: 0.6B, 28 blocks, relative error <= 1e-3."""
    torch.manual_seed(0)
    model = SprintTransformer(SPRINT_0_6B).eval()
    assert jvp_error(model, 0.9, 1e-3, side=8) <= 1e-3


def jvp_error(model: SprintTransformer, angle: float, step: float, side: int) -> float:
    """Returns the relative error of the JVP of F(x, t) along a random direction against (F(+h) - F(-h)) / 2h."""
    generator = torch.Generator().manual_seed(1)
    config = model.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    predict = as_trigflow(velocity_of(model, draw(2, 7, config.caption_channels)))
    x, direction = draw(2, config.in_channels, side, side), draw(2, config.in_channels, side, side)
    t = torch.full((2,), angle)
    speed = t.cos() * t.sin()
    along = speed[:, None, None, None] * direction
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = jvp(predict, (x, t), (along, speed))
        ahead, behind = predict(x + step * along, t + step * speed), predict(x - step * along, t - step * speed)
    difference = (ahead - behind) / (2 * step)
    return float((tangent - difference).norm() / difference.norm())


def test_tangent_of_a_worked_case() -> None:
    x, student, teacher, derivative = (torch.full((1, 1, 1, 1), value) for value in (2.0, 0.5, 0.25, 0.125))
    t = torch.tensor([math.pi / 3])  # cos 0.5, cos sin sqrt(3)/4
    g = losses.tangent(x, t, student, teacher, derivative, warm=0.5)
    assert g.item() == pytest.approx(-0.25 * 0.25 - 0.5 * (math.sqrt(3) / 4 * 2.0 + 0.125), rel=1e-5)


def test_without_warm_up_the_tangent_is_the_flow_of_the_teacher_alone() -> None:
    x, student, derivative = (torch.randn(2, 3, 2, 2) for _ in range(3))
    g = losses.tangent(x, torch.tensor([0.4, 1.2]), student, student, derivative, warm=0.0)
    assert g.abs().max() == 0


def test_normalised_tangent_has_the_papers_norm() -> None:
    g = 40 * torch.randn(3, 4, 2, 2)
    norms = losses.normalised(g).flatten(1).norm(dim=1)
    raw = 0.5 * g.flatten(1).norm(dim=1)
    assert torch.allclose(norms, raw / (raw + 0.1))


def test_scm_gradient_is_the_tangent_and_logvar_settles_where_the_loss_is_one() -> None:
    prediction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    g = torch.tensor([[[[0.1, -0.2], [0.3, 0.0]]]])
    logvar = torch.zeros(1, requires_grad=True)
    angle = torch.tensor([math.atan(2.0)])  # sigma_d tan t = 1
    losses.scm_loss(prediction, prediction.detach(), g, logvar, angle).backward()
    assert prediction.grad is not None
    assert torch.allclose(prediction.grad, -2 * g / 4)
    assert logvar.grad is not None
    assert logvar.grad.item() == pytest.approx(1 - 0.14 / 4, rel=1e-5)


def test_time_proposal_has_the_stated_median_and_max_time_its_share() -> None:
    torch.manual_seed(0)
    drawn = losses.angles(20_000, mean=0.2, std=1.6)
    assert drawn.median().item() == pytest.approx(math.atan(math.exp(0.2) / 0.5), abs=0.02)
    share = (losses.with_max_time(drawn, 0.5) == losses.MAX_ANGLE).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.02)


def test_hinge_losses_of_worked_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert losses.hinge_generator(fake).item() == pytest.approx(1.5)
