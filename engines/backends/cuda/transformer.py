"""The Sprint transformer by cuBLAS products and engines.kernels; shapes as in engines.backends.cuda.blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.backends.cuda.blocks import (
    Blocks,
    Conditioning,
    Inject,
    PreparedText,
    image_tokens,
    lengths_of,
    project_text,
    supported_dtype,
)
from engines.backends.cuda.layers import layer_of
from engines.kernels.modulated_norm import RESIDUAL_NORM
from engines.kernels.op import Ops
from engines.models.transformer import SprintTransformer
from engines.sampler import Denoiser


class CudaTransformer:
    """Replaces SprintTransformer; `prepare` once per request and `velocity` once per step save work."""

    def __init__(self, transformer: SprintTransformer, ops: Ops):
        """Takes the module's weights. Raises BackendError for fp16, in which the residual stream overflows."""
        self.dtype = supported_dtype(transformer)
        self.config = transformer.config
        self._module, self._ops = transformer, ops
        self.blocks = Blocks(transformer.transformer_blocks, transformer.config, ops)
        self._conditioning = Conditioning(transformer.time_embed)

    def to_fp8(self) -> None:
        """Converts products to 8 bits, with scales from the blocks' ranges; the module gives up its blocks."""
        self.blocks.to_fp8()
        del self._module.transformer_blocks  # their weights in bf16

    @torch.no_grad()
    def __call__(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes SprintTransformer.forward; text_mask [B, T] keeps a first part of each text."""
        return self.velocity(latent, self.prepare(text, lengths_of(text, text_mask)), timestep, guidance)

    def denoiser(self, text: Tensor, text_mask: Tensor | None, guidance: Tensor | None) -> Denoiser:
        """Returns the velocity of (latent, timestep); the text is read once for all steps."""
        prepared = self.prepare(text, lengths_of(text, text_mask))
        return lambda latent, timestep: self.velocity(latent, prepared, timestep, guidance)

    @torch.no_grad()
    def prepare(self, text: Tensor, lengths: Tensor) -> PreparedText:
        """Prepares text [B, T, caption_channels], whose first lengths[b] tokens count (int32, on the device)."""
        module = self._module
        return self.blocks.keys(
            project_text(module.caption_projection, module.caption_norm, text.to(self.dtype)), lengths
        )

    @torch.no_grad()
    def velocity(
        self,
        latent: Tensor,
        prepared: PreparedText,
        timestep: Tensor,
        guidance: Tensor | None,
        residuals: Sequence[Tensor] | None = None,
        inject: Inject | None = None,
    ) -> Tensor:
        """Returns v [B, C, h, w]. residuals [B, N, D]: the i-th is added to the output of block i + 1."""
        batch, size = latent.shape[0], (latent.shape[-2], latent.shape[-1])
        modulation, embedded = self._conditioning(timestep, guidance)
        modulations = self.blocks.modulations(modulation)
        x, pending = image_tokens(self._module.patch_embed, latent.to(self.dtype)), None
        for index in range(len(self.blocks)):
            x, due = self.blocks.block(index, x, pending, modulations, prepared, size)
            if inject is not None:
                x, due = inject(index, x, due)
            if residuals is not None and 0 < index <= len(residuals):
                due = due._replace(extra=residuals[index - 1].reshape(x.shape))
            pending = due
        shift, scale = (self._module.scale_shift_table + embedded[:, None]).unbind(1)
        assert pending is not None
        _, h = self._ops(RESIDUAL_NORM, x, *pending, scale, shift, batch, self._module.norm_out.eps)
        out = self.blocks.product(h, layer_of(self._module.proj_out))
        return torch.unflatten(torch.unflatten(out, 0, (batch, -1)).transpose(1, 2), 2, size)
