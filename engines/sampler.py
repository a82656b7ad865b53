"""The sampler: from noise and a velocity network to a clean latent, in closed form, in one to four steps.

Source: the paper (section 3.1, proposition 3.1; appendix table 7). A TrigFlow sample of unit variance at angle t in
[0, pi/2] is x = cos(t)·clean + sin(t)·noise. The network is trained on flow matching, where the same sample is

    t_FM = sin t / (sin t + cos t),    x_FM = k·x,    k = sqrt(t_FM² + (1 - t_FM)²)

and its output is the velocity v = noise - clean. Then clean = x_FM - t_FM·v, and the trigonometric prediction that the
paper trains is F = ((1 - 2·t_FM)·x_FM + (1 - 2·t_FM + 2·t_FM²)·v) / k, with clean = cos(t)·x - sin(t)·F. Upstream's
sigma_data scales the sample up and down again, so it has no effect. Knows no text, no pixels and no device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["paper", "diffusers", "figures"]

# From x_FM [B, C, h, w] and t_FM [B], both fp32, to v [B, C, h, w] in any float type.
Denoiser = Callable[[Tensor, Tensor], Tensor]

# Table 7 and figure 6, searched by FID. The paper has no entry for 3 steps. Its 2 are the first two of its 4, so ours
# for 3 are the first three: each further step refines the same path.
_FIRST = math.atan(200 / 0.5)
ONE_STEP_ANGLE = math.pi / 2
_PAPER: dict[int, tuple[float, ...]] = {
    1: (ONE_STEP_ANGLE,),
    2: (_FIRST, 1.3),
    3: (_FIRST, 1.3, 1.1),
    4: (_FIRST, 1.3, 1.1, 0.6),
}
_DIFFUSERS_FIRST = 1.57080
_FIGURES_FIRST = 1.55413  # one step, 0.6B; a comment of NVlabs' scripts/inference_sana_sprint_geneval.py
# First angle of image-to-image at full strength, at which cos(1.5) = 0.07 of the image remains.
_FULL_STRENGTH = 1.5


def angles_for(steps: int, schedule: Schedule = "paper", one_step: float = ONE_STEP_ANGLE) -> tuple[float, ...]:
    """Returns the angle in radians at which each of `steps` (1 to 4) starts, falling; the image is at angle 0.

    "paper": its searched schedules, and `one_step` for a single step. "diffusers": those of SCMScheduler, evenly spaced
    from 1.57080, but 1.3 second of two. "figures": as "paper", but one step starts as in upstream's script for GenEval.
    Raises ValueError.
    """
    if steps not in _PAPER:
        raise ValueError(f"steps: got {steps}, allowed 1 to {max(_PAPER)}")
    if steps == 1 and schedule != "diffusers":
        return (_FIGURES_FIRST if schedule == "figures" else one_step,)
    if schedule != "diffusers":
        return _PAPER[steps]
    if steps == 2:
        return (_DIFFUSERS_FIRST, 1.3)
    return tuple(_DIFFUSERS_FIRST * (steps - index) / steps for index in range(steps))


def angles_from_image(strength: float, angles: Sequence[float]) -> tuple[float, ...]:
    """Returns as many angles as `angles` for a start from an image; the first is strength·1.5.

    strength in [0, 1]: 0 returns the image, 1 keeps a trace of it. Upstream drops whole steps instead. It therefore
    ignores the image with one step, and with two at its default strength. The n-th angle shrinks by the n-th power of
    the first one's factor, because each step pulls towards the prompt: with equal factors, four steps at strength 0.1
    went as far as one at 0.4. Raises ValueError for another strength.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, allowed 0 to 1")
    factor = strength * _FULL_STRENGTH / angles[0]
    return tuple(angle * factor**number for number, angle in enumerate(angles, 1))


def flow_time(angle: Tensor) -> Tensor:
    """Returns t_FM in [0, 1] of a TrigFlow angle."""
    return angle.sin() / (angle.cos() + angle.sin())


def input_scale(time: Tensor) -> Tensor:
    """Returns k, the ratio of the flow-matching sample to the unit-variance TrigFlow sample at t_FM = `time`."""
    return (time.square() + (1 - time).square()).sqrt()


def trig_prediction(x_flow: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """Returns F of unit variance from the network's input and output; `time` (t_FM) must broadcast against them."""
    return ((1 - 2 * time) * x_flow + (1 - 2 * time + 2 * time.square()) * velocity) / input_scale(time)


def mix(clean: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """Returns cos(angle)·clean + sin(angle)·noise: the unit-variance sample [B, C, h, w] at angle [B]."""
    angle = angle[:, None, None, None]
    return angle.cos() * clean + angle.sin() * noise


def job_noise(seed: int, shape: Sequence[int], count: int) -> Tensor:
    """Returns `count` draws of N(0, 1) from the job's own CPU generator: [count, C, h, w] fp32; shape is (C, h, w).

    The first is the start; the others renew the noise after each step. diffusers also draws them one by one, so an
    equal generator makes an equal image there.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.cat([torch.randn((1, *shape), generator=generator) for _ in range(count)])


def sample(
    denoise: Denoiser, noise: Tensor, angles: Sequence[float] | Tensor, renoise: Sequence[Tensor] | Tensor
) -> Tensor:
    """Returns the clean latent [B, C, h, w] in fp32, of unit variance.

    noise [B, C, h, w]: the sample at the first angle, which is pure noise or an image mixed with it. angles: radians,
    falling, one float per step or a tensor [steps, B]. renoise: fresh N(0, 1) [B, C, h, w] for each step but the first.
    """
    schedule = torch.as_tensor(angles, dtype=torch.float32, device=noise.device)
    if schedule.ndim == 1:
        schedule = schedule[:, None].expand(-1, noise.shape[0])
    clean = x = noise
    for step in range(schedule.shape[0]):
        if step:
            x = mix(clean, renoise[step - 1], schedule[step])
        time = flow_time(schedule[step])
        x_flow = input_scale(time)[:, None, None, None] * x
        clean = x_flow - time[:, None, None, None] * denoise(x_flow, time).float()
    return clean
