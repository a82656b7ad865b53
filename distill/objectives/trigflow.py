"""The training-free wrap of a flow-matching network as a TrigFlow network, and the teacher's flow sampler.

Paper section 3.1, proposition 3.1. The server shares the arithmetic (engines.sampler). A TrigFlow sample has unit
variance here: the paper's sigma_d = 0.5 scales samples and predictions alike and cancels.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from engines.sampler import flow_time, input_scale, trig_prediction

# (x [B,C,h,w], t [B]) -> prediction [B,C,h,w]
Velocity = Callable[[Tensor, Tensor], Tensor]


def as_trigflow(velocity: Velocity) -> Velocity:
    """Turns v(x_FM, t_FM) into F(x, t), the same network in other coordinates, differentiable in both arguments."""

    def trig(x: Tensor, angle: Tensor) -> Tensor:
        time = flow_time(angle)[:, None, None, None]
        x_flow = input_scale(time) * x
        return trig_prediction(x_flow, velocity(x_flow, time[:, 0, 0, 0]), time)

    return trig


def as_flow(trig: Velocity) -> Velocity:
    """Turns F(x, t) into v(x_FM, t_FM), for a network trained without the wrap."""

    def velocity(x_flow: Tensor, time: Tensor) -> Tensor:
        column = time[:, None, None, None]
        x, angle = x_flow / input_scale(column), torch.atan2(time, 1 - time)
        clean = angle.cos()[:, None, None, None] * x - angle.sin()[:, None, None, None] * trig(x, angle)
        return (x_flow - clean) / column

    return velocity


def guided(conditional: Velocity, unconditional: Velocity, scale: float | Tensor) -> Velocity:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional); scale a number or [B]."""

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        without = unconditional(x, time)
        factor = scale[:, None, None, None] if isinstance(scale, Tensor) else scale
        return without + factor * (conditional(x, time) - without)

    return velocity


def flow_times(steps: int, shift: float) -> Tensor:
    """Returns falling flow times [steps + 1] from 1 to 0, shifted towards 1."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def sample_flow(velocity: Velocity, noise: Tensor, steps: int, shift: float) -> Tensor:
    """Integrates by Euler steps in flow coordinates: noise [B,C,h,w] -> clean latents."""
    x, times = noise, flow_times(steps, shift).to(noise.device)
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now.expand(len(x)))
    return x
