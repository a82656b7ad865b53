"""The autoencoder as the engine uses it: unit-variance latents on one side, uint8 RGB on the other.

Scaling and conversion are inside the modules, so that an exported graph holds them too. Conversion as in diffusers'
VaeImageProcessor: x/2 + 0.5, clamped, times 255, rounded.
"""

import torch
from torch import Tensor, nn

from engines.models.dcae import Autoencoder


class PixelDecoder(nn.Module):
    """Latent [B, C, h, w] of unit variance (fp32) to pixels [B, H, W, 3] uint8, and whether each was finite [B]."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.decoder: nn.Module = autoencoder.decoder
        self.scaling_factor = autoencoder.config.scaling_factor
        self.dtype = autoencoder.decoder.conv_in.weight.dtype

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        image: Tensor = self.decoder(latent.to(self.dtype) / self.scaling_factor)
        image = image.float()
        finite = image.sum((1, 2, 3)).abs() < float("inf")  # false for NaN too, which uint8 cannot say
        pixels = (image / 2 + 0.5).clamp(0, 1).mul(255).round()
        # The cast stands at the very end: TensorRT knows uint8 only as the type of an input or output.
        return pixels.permute(0, 2, 3, 1).to(torch.uint8), finite


class PixelEncoder(nn.Module):
    """Pixels [B, H, W, 3] uint8 to the latent [B, C, h, w] of unit variance, fp32."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.encoder = autoencoder.encoder
        self.scaling_factor = autoencoder.config.scaling_factor
        self.dtype = autoencoder.decoder.conv_in.weight.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        image = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1
        latent: Tensor = self.encoder(image.to(self.dtype))
        return latent.float() * self.scaling_factor
