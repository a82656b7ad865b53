"""The closed form against upstream's scheduler loop, and the angles of image-to-image."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import SCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from engines.sampler import (
    Schedule,
    angles_for,
    angles_from_image,
    flow_time,
    input_scale,
    job_noise,
    mix,
    sample,
    trig_prediction,
)

SHAPE = (4, 6, 5)


def velocity(x: Tensor, time: Tensor) -> Tensor:
    """Stands in for a network: nonlinear, and dependent on time and position."""
    return torch.tanh(1.7 * x) + time[:, None, None, None] * x.roll(1, dims=-1)


def upstream_loop(seed: int, steps: int) -> Tensor:
    """Runs the loop of diffusers' SanaSprintPipeline.__call__ (7. Denoising loop), with its scheduler and generator."""
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    scheduler.set_begin_index(0)
    sigma = scheduler.config.sigma_data
    generator = torch.Generator().manual_seed(seed)
    latents = randn_tensor((1, *SHAPE), generator=generator) * sigma
    for t in scheduler.timesteps[:-1]:
        timestep = t.expand(1)
        time = (torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))).view(-1, 1, 1, 1)
        scale = torch.sqrt(time**2 + (1 - time) ** 2)
        x = latents / sigma * scale
        predicted = velocity(x, time.flatten())
        predicted = ((1 - 2 * time) * x + (1 - 2 * time + 2 * time**2) * predicted) / scale
        latents, denoised = scheduler.step(predicted * sigma, timestep, latents, generator=generator, return_dict=False)
    return denoised / sigma


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_equals_upstreams_scheduler_with_the_same_generator(steps: int) -> None:
    noise = job_noise(7, SHAPE, steps)[:, None]
    ours = sample(velocity, noise[0], angles_for(steps, "diffusers"), noise[1:])
    torch.testing.assert_close(ours, upstream_loop(7, steps), rtol=0, atol=1e-5)


def test_one_step_is_noise_minus_velocity() -> None:
    noise = job_noise(3, SHAPE, 1)
    expected = noise - velocity(noise, torch.ones(1))
    torch.testing.assert_close(sample(velocity, noise, angles_for(1), []), expected, rtol=0, atol=1e-6)


def test_noise_is_the_seeds_own_and_starts_as_torch_randn() -> None:
    draws = job_noise(11, SHAPE, 3)
    generator = torch.Generator().manual_seed(11)
    assert all(torch.equal(draw[None], torch.randn((1, *SHAPE), generator=generator)) for draw in draws)
    assert torch.equal(job_noise(11, SHAPE, 1)[0], draws[0])
    assert not torch.equal(job_noise(12, SHAPE, 1)[0], draws[0])
    assert job_noise(2**63 - 1, SHAPE, 1).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_angles_per_job_are_independent(steps: int) -> None:
    noise = torch.stack([job_noise(seed, SHAPE, steps) for seed in (1, 2)], dim=1)
    schedules: list[Schedule] = ["paper", "diffusers"]
    angles = torch.tensor([angles_for(steps, schedule) for schedule in schedules]).T
    together = sample(velocity, noise[0], angles, noise[1:])
    for index, schedule in enumerate(schedules):
        alone = noise[:, index : index + 1]
        expected = sample(velocity, alone[0], angles_for(steps, schedule), alone[1:])
        torch.testing.assert_close(together[index : index + 1], expected, rtol=0, atol=1e-6)


def test_published_schedules() -> None:
    assert angles_for(1) == (math.pi / 2,)
    assert angles_for(2) == pytest.approx((1.56830, 1.3), abs=1e-5)
    assert angles_for(4) == pytest.approx((1.56830, 1.3, 1.1, 0.6), abs=1e-5)
    assert angles_for(3) == angles_for(4)[:3]
    assert [angles_for(steps, "figures") for steps in (1, 2)] == [(1.55413,), angles_for(2)]
    assert [angles_for(steps, "paper", 1.55651) for steps in (1, 2)] == [(1.55651,), angles_for(2)]
    assert angles_for(4, "diffusers") == pytest.approx((1.5708, 1.1781, 0.7854, 0.3927), abs=1e-4)


@pytest.mark.parametrize("steps", [0, 5])
def test_number_of_steps_out_of_range_is_an_error(steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps}, allowed 1 to 4"):
        angles_for(steps)


def test_wrap_agrees_with_flow_matching() -> None:
    """Compares a sample in TrigFlow and in flow matching (paper, proposition 3.1)."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 5, *SHAPE, dtype=torch.float64)
    angle = torch.linspace(0.05, 1.55, 5, dtype=torch.float64)
    time = flow_time(angle)[:, None, None, None]
    x_flow = input_scale(time) * mix(clean, noise, angle)
    torch.testing.assert_close(x_flow, (1 - time) * clean + time * noise)
    predicted = trig_prediction(x_flow, noise - clean, time)
    cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
    torch.testing.assert_close(predicted, cos * noise - sin * clean)
    torch.testing.assert_close(x_flow - time * (noise - clean), clean)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_strength_moves_the_start_and_none_drops_the_image(steps: int) -> None:
    base = angles_for(steps)
    starts = [angles_from_image(strength / 20, base) for strength in range(21)]
    assert starts[0] == (0.0,) * steps
    for weaker, stronger in pairwise(starts):
        assert len(stronger) == steps
        assert 0 < stronger[0] - weaker[0] < 0.1
        assert list(stronger) == sorted(stronger, reverse=True)
    assert all(math.cos(start[0]) > 0.05 for start in starts)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_strength_zero_gives_the_image_back(steps: int) -> None:
    image = torch.randn(1, *SHAPE)
    noise = job_noise(0, SHAPE, steps)[:, None]
    angles = angles_from_image(0.0, angles_for(steps))
    start = mix(image, noise[0], torch.tensor(angles[:1]))
    torch.testing.assert_close(sample(velocity, start, angles, noise[1:]), image)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range_is_an_error(strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        angles_from_image(strength, angles_for(1))
