"""DC-AE's encoder from engines.kernels: uint8 pixels to latents, for drawings and image-to-image.

The blocks are the decoder's (engines.backends.cuda.decoder). Downsampling is one strided convolution by cuDNN, whose
weights include the averaging shortcut; the last convolution's weights include theirs too. The result equals
engines.models.pixels.PixelEncoder up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cuda.autoencoder_blocks import (
    BorderedImage,
    ResidualBlock,
    make_blocks,
    unsupported_blocks,
)
from engines.kernels.autoencoder.border import ZERO_BORDER
from engines.kernels.autoencoder.padded import Grid
from engines.kernels.op import Ops
from engines.models.dcae import AutoencoderConfig, Downsample, Encoder
from engines.models.pixels import PixelEncoder

_INPUTS = 8  # channels of the first convolution: RGB, a constant 1 that carries the bias, and zeros


def unsupported_encoder(config: AutoencoderConfig) -> str | None:
    """Returns the reason why these kernels cannot run an encoder of this architecture; None if they can."""
    reason = unsupported_blocks(
        "encoder",
        config.encoder_block_types,
        config.encoder_layers_per_block,
        config.encoder_block_out_channels,
        config.encoder_qkv_multiscales,
        config.attention_head_dim,
    )
    if reason is not None:
        return reason
    if config.downsample_block_type == "pixel_unshuffle" or config.in_channels != 3:
        return f"downsample_block_type is {config.downsample_block_type}; strided convolutions of RGB are needed"
    return None


class _Downsampling:
    """Computes dcae.Downsample, with the shortcut folded into the weights."""

    def __init__(self, down: Downsample):
        weight = down.conv.weight.detach().float().clone()
        if down.group:  # channel 4c + 2y + x of the unshuffled image is pixel (y, x) of channel c
            channel = torch.arange(weight.shape[0] * down.group, device=weight.device)
            weight[channel // down.group, channel // 4, 1 + channel % 4 // 2, 1 + channel % 2] += 1 / down.group
        self.weight = weight.to(down.conv.weight.dtype).to(memory_format=torch.channels_last)
        self.bias = down.conv.bias

    def __call__(self, ops: Ops, x: Tensor, grid: Grid, bordered: bool, next_bordered: bool) -> tuple[Tensor, Grid]:
        """Halves a matrix, zero-bordered or plain, to a matrix, zero-bordered or plain."""
        halved = Grid(grid.batch, grid.height // 2, grid.width // 2)
        around = 2 if bordered else 0
        image = x.view(grid.batch, grid.height + around, grid.width + around, x.shape[1]).permute(0, 3, 1, 2)
        padding = (0 if bordered else 1) + (2 if next_bordered else 0)
        y = F.conv2d(image, self.weight, self.bias, stride=2, padding=padding)
        flat = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).contiguous()
        output: Tensor = ops(ZERO_BORDER, flat, halved) if next_bordered else flat
        return output, halved


class CudaEncoder:
    """Replaces PixelEncoder: pixels [B, H, W, 3] uint8 to the latent [B, C, h, w] of unit variance, fp32."""

    def __init__(self, module: PixelEncoder, ops: Ops):
        encoder = module.encoder
        assert isinstance(encoder, Encoder)
        assert isinstance(encoder.conv_in, nn.Conv2d)
        self._ops, self._factor = ops, module.scaling_factor
        first = encoder.conv_in.weight.detach()
        self._dtype = first.dtype
        self._conv_in = torch.zeros(first.shape[0], _INPUTS, 3, 3, dtype=first.dtype, device=first.device)
        self._conv_in[:, :3] = first
        assert encoder.conv_in.bias is not None
        self._conv_in[:, 3, 1, 1] = encoder.conv_in.bias.detach()
        self._conv_in = self._conv_in.to(memory_format=torch.channels_last)
        self._stages = [(make_blocks(stage), _downsampling_of(stage)) for stage in encoder.down_blocks]
        last = encoder.conv_out.weight.detach().float().clone()
        if encoder.group:
            channel = torch.arange(last.shape[1], device=last.device)
            last[channel // encoder.group, channel, 1, 1] += 1 / encoder.group
        self._conv_out = last.to(first.dtype).to(memory_format=torch.channels_last)
        self._conv_out_bias = encoder.conv_out.bias

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        grid = Grid(*pixels.shape[:3])
        x = self._first_convolution(pixels, grid)
        for index, (blocks, down) in enumerate(self._stages):
            bordered = isinstance(blocks[0], ResidualBlock)
            for block in blocks:
                if isinstance(block, ResidualBlock):
                    x = block(self._ops, BorderedImage(x, x), grid, None).full
                else:
                    x = block(self._ops, x, grid, "plain")
            if down is not None:
                after = isinstance(self._stages[index + 1][0][0], ResidualBlock)
                x, grid = down(self._ops, x, grid, bordered, after)
        image = x.view(*grid, x.shape[1]).permute(0, 3, 1, 2)
        latent = F.conv2d(image, self._conv_out, self._conv_out_bias, padding=1)
        return latent.float() * self._factor

    def _first_convolution(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Returns the first convolution's result as a zero-bordered matrix."""
        wide = torch.zeros(
            grid.batch, grid.height + 4, grid.width + 4, _INPUTS, dtype=self._dtype, device=pixels.device
        )
        inner = wide[:, 2:-2, 2:-2]
        inner[..., :3] = pixels.float() / 127.5 - 1
        inner[..., 3] = 1
        y = F.conv2d(wide.permute(0, 3, 1, 2), self._conv_in)
        output: Tensor = self._ops(ZERO_BORDER, y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).contiguous(), grid)
        return output


def _downsampling_of(stage: nn.Module) -> _Downsampling | None:
    """Returns the downsampling after a stage; None for the last."""
    return next((_Downsampling(part) for part in stage.children() if isinstance(part, Downsample)), None)
