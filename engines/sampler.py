"""Noise and a velocity network to a clean latent, in closed form, in one to four steps.

Laid beside the paper (section 3.1, proposition 3.1; appendix table 7). A TrigFlow sample of unit variance at angle t in
[0, pi/2] is x = cos(t)·clean + sin(t)·noise. The network was trained on flow matching, where the same sample is

    t_FM = sin t / (sin t + cos t),    x_FM = k·x,    k = sqrt(t_FM² + (1 - t_FM)²)

and its answer is the velocity v = noise - clean. Then clean = x_FM - t_FM·v, and the trigonometric prediction that the
paper trains is F = ((1 - 2·t_FM)·x_FM + (1 - 2·t_FM + 2·t_FM²)·v) / k, with clean = cos(t)·x - sin(t)·F. Upstream's
sigma_data scales the sample up and down again and never shows. Knows no text, no pixels and no device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["paper", "diffusers", "figures"]

# A denoiser takes x_FM [B, C, h, w] (fp32) and t_FM [B] (fp32), and gives v [B, C, h, w] in any float type.
Denoiser = Callable[[Tensor, Tensor], Tensor]

# Searched by FID (table 7, figure 6). It has no entry for 3: ours is the first three of the 4, as its 2 are the first
# two of the 4, so each further step refines the same path.
_FIRST = math.atan(200 / 0.5)
_PAPER: dict[int, tuple[float, ...]] = {
    1: (math.pi / 2,),
    2: (_FIRST, 1.3),
    3: (_FIRST, 1.3, 1.1),
    4: (_FIRST, 1.3, 1.1, 0.6),
}
_DIFFUSERS_FIRST = 1.57080
_FIGURES_FIRST = 1.55413  # NVlabs' scripts/inference_sana_sprint_geneval.py, a comment: one step, 0.6B
# Image-to-image at full strength starts here: the image keeps cos(1.5) = 0.07 of the mixture and is never ignored.
_FULL_STRENGTH = 1.5


def angles_for(steps: int, schedule: Schedule = "paper") -> tuple[float, ...]:
    """The angle in radians that each of the `steps` (1 to 4) starts from, falling; the picture is at angle 0.

    "paper": the schedules it searched. "diffusers": SCMScheduler's, max_timesteps 1.57080 and intermediate_timesteps
    1.3 for two steps, evenly spaced otherwise. "figures": the paper's, but one step starts where upstream's script for
    GenEval says that it does. Raises ValueError for another number of steps.
    """
    if steps not in _PAPER:
        raise ValueError(f"steps: got {steps}, allowed 1 to {max(_PAPER)}")
    if schedule == "figures" and steps == 1:
        return (_FIGURES_FIRST,)
    if schedule != "diffusers":
        return _PAPER[steps]
    if steps == 2:
        return (_DIFFUSERS_FIRST, 1.3)
    return tuple(_DIFFUSERS_FIRST * (steps - index) / steps for index in range(steps))


def angles_from_image(strength: float, angles: Sequence[float]) -> tuple[float, ...]:
    """The angles for a start from an image: as many as `angles`, the first at strength·1.5.

    strength in [0, 1]: 0 gives the image back, 1 keeps a trace of it. Every strength moves the start, at any number of
    steps; upstream's image-to-image drops whole steps instead, so that with one step, or with two at its default
    strength, it ignores the image. Step n shrinks by the n-th power of what the first shrinks by: each step pulls
    towards the prompt, and shrunk alike four steps at strength 0.1 went as far as one step at 0.4. Raises ValueError
    for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, allowed 0 to 1")
    shrunk = strength * _FULL_STRENGTH / angles[0]
    return tuple(angle * shrunk**number for number, angle in enumerate(angles, 1))


def flow_time(angle: Tensor) -> Tensor:
    """t_FM in [0, 1] of a TrigFlow angle."""
    return angle.sin() / (angle.cos() + angle.sin())


def input_scale(time: Tensor) -> Tensor:
    """k, which turns a unit-variance TrigFlow sample into the flow-matching sample at t_FM = `time`."""
    return (time.square() + (1 - time).square()).sqrt()


def trig_prediction(x_flow: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """F of unit variance from the network's input and output; `time` (t_FM) must broadcast against them."""
    return ((1 - 2 * time) * x_flow + (1 - 2 * time + 2 * time.square()) * velocity) / input_scale(time)


def mix(clean: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """cos(angle)·clean + sin(angle)·noise: the unit-variance sample [B, C, h, w] at angle [B]."""
    angle = angle[:, None, None, None]
    return angle.cos() * clean + angle.sin() * noise


def job_noise(seed: int, shape: Sequence[int], count: int) -> Tensor:
    """`count` draws of N(0, 1) of `shape` [C, h, w] from the job's own CPU generator: [count, C, h, w], fp32.

    The first is the start, the others renew the noise after each step. They are drawn one by one as diffusers does
    (which spends one more after the last step), so that a pipeline with an equal generator makes an equal picture.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.cat([torch.randn((1, *shape), generator=generator) for _ in range(count)])


def sample(
    denoise: Denoiser, noise: Tensor, angles: Sequence[float] | Tensor, renoise: Sequence[Tensor] | Tensor
) -> Tensor:
    """The clean latent [B, C, h, w] in fp32, of unit variance as the network was trained on.

    noise [B, C, h, w]: the sample at the first angle (pure noise, or an image mixed with it); angles: radians, falling,
    either one float per step or a tensor [steps, B]; renoise: fresh N(0, 1) [B, C, h, w] for each step but the first.
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
