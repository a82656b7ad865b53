"""The autoencoder between unit-variance latents and uint8 RGB.

The modules include scaling and conversion, so that an exported graph includes them. Conversion is that of diffusers'
VaeImageProcessor: x/2 + 0.5, clamped, times 255, rounded.
"""

import torch
from torch import Tensor, nn

from engines.models.dcae import Autoencoder, AutoencoderConfig, Decoder
from engines.models.taesana import TaesanaDecoder


class PixelDecoder(nn.Module):
    """Decodes latents [B, C, h, w] of unit variance, fp32, to pixels [B, H, W, 3] uint8 and flags [B]: all finite."""

    def __init__(self, source: Autoencoder | TaesanaDecoder):
        """source: an autoencoder, whose decoder runs, or a TAESANA, which takes latents of unit variance."""
        super().__init__()
        self.decoder: nn.Module = source.decoder if isinstance(source, Autoencoder) else source
        self.config: AutoencoderConfig | None = source.config if isinstance(source, Autoencoder) else None
        self.scaling_factor = 1.0 if self.config is None else self.config.scaling_factor
        self.dtype = next(self.decoder.parameters()).dtype

    @property
    def dcae(self) -> Decoder | None:
        """DC-AE's decoder as it was loaded; None for a TAESANA, and once a backend has replaced it."""
        return self.decoder if isinstance(self.decoder, Decoder) else None

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        image: Tensor = self.decoder(latent.to(self.dtype) / self.scaling_factor)
        image = image.float()
        finite = image.sum((1, 2, 3)).abs() < float("inf")  # false for NaN too, which uint8 cannot represent
        pixels = (image / 2 + 0.5).clamp(0, 1).mul(255).round()
        # The cast is last: TensorRT supports uint8 only for inputs and outputs.
        return pixels.permute(0, 2, 3, 1).to(torch.uint8), finite


class PixelEncoder(nn.Module):
    """Encodes pixels [B, H, W, 3] uint8 to the latent [B, C, h, w] of unit variance, fp32."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.encoder = autoencoder.encoder
        self.scaling_factor = autoencoder.config.scaling_factor
        self.dtype = next(self.encoder.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        image = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1
        latent: Tensor = self.encoder(image.to(self.dtype))
        return latent.float() * self.scaling_factor
