"""The transformer with a ControlNet (engines.models.controlnet, both injections) on engines.backends.cuda.blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from engines.backends.cuda.blocks import (
    Blocks,
    Conditioning,
    Pending,
    PreparedText,
    image_tokens,
    lengths_of,
    project_text,
    supported_dtype,
)
from engines.backends.cuda.layers import layer_of
from engines.backends.cuda.transformer import CudaTransformer
from engines.kernels.modulated_norm import RESIDUAL
from engines.kernels.op import Ops
from engines.models.controlnet import ControlledTransformer
from engines.sampler import Denoiser


class PreparedControl(NamedTuple):
    """Prompts as transformer and copied blocks read them; hint: the drawing's tokens [B*N, D] to add."""

    base: PreparedText
    copies: PreparedText
    hint: Tensor


class CudaControlled:
    """Replaces ControlledTransformer; base: the CudaTransformer of the same transformer, if it exists."""

    def __init__(self, controlled: ControlledTransformer, ops: Ops, base: CudaTransformer | None = None):
        supported_dtype(controlled.controlnet)
        self.base = CudaTransformer(controlled.transformer, ops) if base is None else base
        self._net, self._ops = controlled.controlnet, ops
        copies = controlled.controlnet.config.copies
        self.copies = Blocks(controlled.controlnet.transformer_blocks, copies, ops)
        self._embeds = copies.guidance_embeds
        self._conditioning = Conditioning(controlled.controlnet.time_embed)
        self._diffusers = controlled.controlnet.config.injection == "diffusers"

    @torch.no_grad()
    def __call__(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text_mask: Tensor | None,
        control: Tensor,
        control_scale: Tensor,
    ) -> Tensor:
        """Computes ControlledTransformer.forward; text_mask [B, T] keeps a first part of each text."""
        prepared = self.prepare(text, lengths_of(text, text_mask), control)
        return self.velocity(latent, prepared, timestep, guidance, control_scale)

    def denoiser(
        self, text: Tensor, text_mask: Tensor | None, guidance: Tensor | None, control: Tensor, control_scale: Tensor
    ) -> Denoiser:
        """Returns the velocity of (latent, timestep); text and drawing are read once for all steps."""
        prepared = self.prepare(text, lengths_of(text, text_mask), control)
        return lambda latent, timestep: self.velocity(latent, prepared, timestep, guidance, control_scale)

    @torch.no_grad()
    def prepare(self, text: Tensor, lengths: Tensor, control: Tensor) -> PreparedControl:
        """Prepares text as CudaTransformer.prepare; control: the drawing's latent [B, C, h, w]."""
        net, dtype = self._net, self.base.dtype
        base = self.base.prepare(text, lengths)
        text_tokens = project_text(net.caption_projection, net.caption_norm, text.to(dtype))
        hint = image_tokens(net.patch_embed, control.to(dtype), with_positions=self._diffusers)
        hint = self.copies.product(hint, layer_of(net.input_block))
        return PreparedControl(base, self.copies.keys(text_tokens, lengths), hint)

    @torch.no_grad()
    def velocity(
        self,
        latent: Tensor,
        prepared: PreparedControl,
        timestep: Tensor,
        guidance: Tensor | None,
        control_scale: Tensor,
    ) -> Tensor:
        """Returns v [B, C, h, w] of a latent [B, C, h, w]; control_scale [B]."""
        latent = latent.to(self.base.dtype)
        size = (latent.shape[-2], latent.shape[-1])

        def compute_residuals(x: Tensor) -> list[Tensor]:
            return self._residuals(x + prepared.hint, prepared.copies, timestep, guidance, control_scale, size)

        residuals: list[Tensor]
        if self._diffusers:
            residuals = compute_residuals(image_tokens(self._net.patch_embed, latent))
            return self.base.velocity(latent, prepared.base, timestep, guidance, residuals)
        residuals = []

        def after_own_block(index: int, x: Tensor, pending: Pending) -> tuple[Tensor, Pending]:
            if index == 0:
                residuals.extend(compute_residuals(self._ops(RESIDUAL, x, *pending, latent.shape[0])))
            return x, pending._replace(extra=residuals[index]) if index < len(residuals) else pending

        return self.base.velocity(latent, prepared.base, timestep, guidance, inject=after_own_block)

    def _residuals(
        self,
        x: Tensor,
        text: PreparedText,
        timestep: Tensor,
        guidance: Tensor | None,
        control_scale: Tensor,
        size: tuple[int, int],
    ) -> list[Tensor]:
        """Returns one residual [B*N, D] per copied block; x [B*N, D]: input of the first."""
        batch = timestep.shape[0]
        modulation, _ = self._conditioning(timestep, guidance if self._embeds else None)
        modulations = self.copies.modulations(modulation)
        scale = control_scale.to(x.dtype)[:, None, None]
        residuals = []
        for index, project in enumerate(self._net.controlnet_blocks):
            x, pending = self.copies.block(index, x, None, modulations, text, size)
            x = self._ops(RESIDUAL, x, *pending, batch)
            residual = torch.unflatten(self.copies.product(x, layer_of(project)), 0, (batch, -1))
            residuals.append((residual * scale).flatten(0, 1))
        return residuals
