"""Limits of an engine of a checkpoint, its latent space, and the shapes of its kernels."""

import math
from dataclasses import dataclass, replace

import torch

from engines.checkpoints.checkpoint import Checkpoint
from engines.errors import CheckpointError
from engines.types import Limits


@dataclass(frozen=True)
class LatentSpace:
    """Constants of a checkpoint's latents and of its sampling."""

    channels: int
    compression: int  # pixels per latent cell along a side
    guidance_embeds_scale: float
    one_step_angle: float  # radians
    dtype: torch.dtype  # of the transformer
    device: torch.device


def limits_of(
    checkpoint: Checkpoint,
    max_batch: int,
    *,
    control: bool,
    adapters: tuple[str, ...] = (),
    sizes: tuple[tuple[int, int], ...] = (),
    fast_decoder: bool = False,
) -> Limits:
    """Returns the limits. Sides reach twice the training size, beyond which images repeat themselves.

    sizes: the allowed (width, height) in pixels; empty: those of the checkpoint. Raises CheckpointError.
    """
    settings = checkpoint.settings
    width, height = settings.default_size
    limits = Limits(
        max_batch=max_batch,
        default_size=settings.default_size,
        sizes=settings.sizes,
        multiple=math.lcm(32, checkpoint.autoencoder.compression),
        max_side=2 * max(width, height),
        max_pixels=4 * width * height,
        conditioning=frozenset({"text", "image", "control", "image+control"} if control else {"text", "image"}),
        adapters=adapters,
        decoders=("full", "fast") if fast_decoder else ("full",),
    )
    if not limits.allows_size(width, height):
        raise CheckpointError(
            f"{checkpoint.name}: sprint.json: default_size {width}x{height} is not among its sizes, or no multiple of "
            f"{limits.multiple}"
        )
    if sizes:
        default = limits.default_size if limits.default_size in sizes else sizes[-1]
        limits = replace(limits, sizes=tuple(sorted(sizes)), default_size=default)
    return limits


def space_of(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> LatentSpace:
    config, compression = checkpoint.transformer, checkpoint.autoencoder.compression
    angle = checkpoint.settings.one_step_angle
    return LatentSpace(config.in_channels, compression, config.guidance_embeds_scale, angle, dtype, device)


def shapes_of(
    checkpoint: Checkpoint,
    sizes: tuple[tuple[int, int], ...],
    precision: str,
    max_batch: int,
    fast: Checkpoint | None,
    *,
    control: bool,
) -> str:
    """Returns a text that identifies the shapes of an engine's kernels, loaded or built.

    fast: its second decoder. control: it has a ControlNet, whose norms add what no other's do.
    """
    decoders = [one.autoencoder for one in (checkpoint, fast) if one is not None]
    return f"{decoders} {checkpoint.transformer} {sizes} {precision} {max_batch} {control}"
