"""The two losses of the distillation as pure functions: sCM (continuous-time consistency) and LADD (adversarial).

Samples and predictions have unit variance here; the paper's have sigma_d = 0.5. The scale matters only where SIGMA_DATA
is used. Sources: paper section 3.2 and algorithm 2; sCM (arXiv 2410.11081) equations 8 to 10; LADD (arXiv
2403.12015) equation 3; released train_scm_ladd.py.

Shapes: B jobs, C latent channels, h x w latent.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_DATA = 0.5
MAX_ANGLE = 1.57080  # upstream's largest timestep, a rounding above pi/2


def angles(count: int, mean: float, std: float) -> Tensor:
    """Draws t = arctan(e^tau / sigma_d), tau ~ N(mean, std^2): [count] in (0, pi/2). Paper F.2."""
    return torch.atan(torch.exp(mean + std * torch.randn(count)) / SIGMA_DATA)


def with_max_time(angle: Tensor, probability: float) -> Tensor:
    """Replaces each angle by the largest one with `probability` (max-time weighting, paper 3.3)."""
    return torch.where(torch.rand_like(angle) < probability, torch.full_like(angle, MAX_ANGLE), angle)


def tangent(x: Tensor, angle: Tensor, student: Tensor, teacher: Tensor, derivative: Tensor, warm: float) -> Tensor:
    """Returns the rearranged tangent g before normalisation, in unit-variance coordinates: [B,C,h,w].

        g = -cos^2 t (F- - F_teacher) - r (cos t sin t x + dF-)

    derivative: the JVP of F- along (cos t sin t F_teacher, cos t sin t); warm: r = min(1, iteration / H).
    Paper algorithm 2, line 8.
    """
    angle = angle[:, None, None, None]
    cos, sin = angle.cos(), angle.sin()
    g: Tensor = -cos.square() * (student - teacher) - warm * (cos * sin * x + derivative)
    return g


def normalised(g: Tensor, constant: float = 0.1) -> Tensor:
    """Returns g / (||g|| + c) per sample at the paper's scale (sigma_d g). Paper algorithm 2, line 9."""
    scaled = SIGMA_DATA * g
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True)
    return scaled / (norm + constant)


def scm_loss(prediction: Tensor, frozen: Tensor, g: Tensor, logvar: Tensor, angle: Tensor) -> Tensor:
    """Returns mean( e^-logvar / (sigma_d tan t) * (F - F- - g)^2 + logvar ), a scalar.

    prediction (F) has gradients, frozen (F-) is the same value without them, g is the normalised tangent, and
    logvar [B] the learned adaptive weight. Paper algorithm 2, line 10.
    """
    weight = torch.exp(-logvar) / (SIGMA_DATA * torch.tan(angle))
    squares = (prediction - frozen - g).square().mean(dim=(1, 2, 3))
    return (weight * squares + logvar).mean()


def converged_logvar(elements: int, angle: Tensor) -> Tensor:
    """Returns the logvar [B] of equal weights at all angles [B], for a unit tangent over `elements` values."""
    return -math.log(elements) - torch.log(SIGMA_DATA * torch.tan(angle))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Returns half of mean ReLU(1 - D(real)) + mean ReLU(1 + D(fake)) of logits of any shape. LADD equation 3."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Returns -mean D(fake)."""
    return -fake.mean()
