"""DC-AE's decoder from engines.kernels: latents to uint8 pixels, in NHWC throughout.

Stages of EfficientViT blocks hold plain [B*H*W, C] matrices. From the first stage of ResBlocks on, matrices have zero
borders (engines.kernels.autoencoder.padded), so that convolutions are products. The result equals
engines.models.pixels.PixelDecoder up to rounding: sums and norms are fp32, and each kernel rounds once. In fp8 the
ResBlocks' convolutions multiply e4m3 numbers, with one scale per activation tensor and one per output channel of
weights; the residual stream stays bf16.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.cuda.autoencoder_blocks import (
    NORM_WIDTHS,
    BorderedImage,
    Norm,
    ResidualBlock,
    VitBlock,
    make_blocks,
    unsupported_blocks,
)
from engines.kernels.autoencoder.convolution import CONVOLUTION_TAPS, tap_weight
from engines.kernels.autoencoder.padded import Grid
from engines.kernels.autoencoder.pixels import PIXELS
from engines.kernels.autoencoder.upsampling import UPSAMPLING
from engines.kernels.op import Ops
from engines.models.dcae import AutoencoderConfig, Decoder, Upsample
from engines.models.folding import folded_kernel
from engines.models.pixels import PixelDecoder


def unsupported_decoder(config: AutoencoderConfig) -> str | None:
    """Returns the reason why these kernels cannot run a decoder of this architecture; None if they can."""
    reason = unsupported_blocks(
        "decoder",
        config.decoder_block_types,
        config.decoder_layers_per_block,
        config.decoder_block_out_channels,
        config.decoder_qkv_multiscales,
        config.attention_head_dim,
    )
    if reason is not None:
        return reason
    if config.upsample_block_type != "interpolate" or config.decoder_conv_act_fn != "relu" or config.in_channels != 3:
        return (
            f"upsample_block_type is {config.upsample_block_type}, decoder_conv_act_fn {config.decoder_conv_act_fn}; "
            "interpolate, relu and RGB are needed"
        )
    if config.decoder_block_out_channels[0] not in NORM_WIDTHS:
        return f"the last stage has {config.decoder_block_out_channels[0]} channels; one of {NORM_WIDTHS} is needed"
    return None


class _Upsampling:
    """Computes dcae.Upsample on a zero-bordered matrix."""

    def __init__(self, upsample: Upsample):
        weight, bias = folded_kernel(upsample)
        self.weight = weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
        assert bias is not None
        self.bias = bias.detach()[: bias.shape[0] // 4].float()  # all four phases have the same bias

    def __call__(self, ops: Ops, x: Tensor, grid: Grid, bordered: bool, next_scale: float | None) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = ops(UPSAMPLING, x, self.weight, self.bias, bordered, next_scale, grid)
        return output


class CudaDecoder:
    """Replaces PixelDecoder: latents [B, C, h, w] fp32 to pixels [B, H, W, 3] uint8, and whether each is finite.

    Takes the weights of a PixelDecoder that `unsupported_decoder` accepts. `calibrate` and then `to_fp8` convert the
    ResBlocks to 8 bits.
    """

    def __init__(self, module: PixelDecoder, ops: Ops):
        decoder = module.decoder
        assert isinstance(decoder, Decoder)
        self._ops, self._factor = ops, module.scaling_factor
        self._conv_in = decoder.conv_in.weight.detach().clone()
        if decoder.repeats:  # folds the shortcut: a 1 at the centre of each kernel
            channels = torch.arange(self._conv_in.shape[0], device=self._conv_in.device)
            self._conv_in[channels, channels // decoder.repeats, 1, 1] += 1
        self._conv_in_bias = decoder.conv_in.bias
        self._dtype = self._conv_in.dtype
        stages: list[tuple[Any, list[Any]]] = [
            (_upsampling_of(stage), make_blocks(stage)) for stage in reversed(decoder.up_blocks)
        ]
        self._low_resolution = [stage for stage in stages if isinstance(stage[1][0], VitBlock)]
        self._high_resolution = [stage for stage in stages if isinstance(stage[1][0], ResidualBlock)]
        self._norm_out = Norm(decoder.norm_out)
        assert isinstance(decoder.conv_out, nn.Conv2d)
        self._conv_out = tap_weight(decoder.conv_out.weight.detach())
        assert decoder.conv_out.bias is not None
        self._bias_out = decoder.conv_out.bias.detach().float()

    def __call__(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        x, grid = self._low_stages(latent)
        for index, (upsampling, blocks) in enumerate(self._high_resolution):
            stream, grid = self._upsample(upsampling, x, grid, blocks[0].input_scale)
            last = index == len(self._high_resolution) - 1
            scales = [block.input_scale for block in blocks[1:]] + [None]
            for block, next_scale in zip(blocks[: len(blocks) - last], scales, strict=False):
                stream = block(self._ops, stream, grid, next_scale)
            x = stream.full
        taps = self._last_block(blocks[-1], stream, grid)
        pixels, broken = self._ops(PIXELS, taps, self._bias_out, grid)
        return pixels, broken == 0

    def calibrate(self, latents: Tensor) -> None:
        """Extends each convolution's input range by the values of these latents [B, C, h, w]."""
        x, grid = self._low_stages(latents)
        for upsampling, blocks in self._high_resolution:
            stream, grid = self._upsample(upsampling, x, grid, None)
            for block in blocks:
                hidden = block.hidden(self._ops, stream, grid)
                largest = (float(stream.full.abs().amax()), float(hidden.abs().amax()))
                block.max_values = [max(pair) for pair in zip(block.max_values, largest, strict=True)]
                stream = block(self._ops, stream, grid, None)
            x = stream.full

    @property
    def ranges(self) -> list[list[float]]:
        """The largest input and hidden value of each ResBlock in calibration."""
        return [block.max_values for block in self._residual()]

    def include_ranges(self, ranges: Sequence[Sequence[float]]) -> None:
        """Extends the ranges by those of another calibration."""
        for block, largest in zip(self._residual(), ranges, strict=True):
            block.max_values = [max(pair) for pair in zip(block.max_values, largest, strict=True)]

    def to_fp8(self) -> None:
        """Converts the ResBlocks to 8 bits, with scales from the ranges."""
        for block in self._residual():
            block.to_fp8()

    def _residual(self) -> list[ResidualBlock]:
        return [block for _, blocks in self._high_resolution for block in blocks]

    def _low_stages(self, latent: Tensor) -> tuple[Tensor, Grid]:
        grid = Grid(latent.shape[0], latent.shape[2], latent.shape[3])
        x = (latent / self._factor).to(self._dtype).to(memory_format=torch.channels_last)
        y = F.conv2d(x, self._conv_in, self._conv_in_bias, padding=1)
        x = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).contiguous()
        for upsampling, blocks in self._low_resolution:
            if upsampling is not None:
                (x,), grid = upsampling(self._ops, x, grid, False, None), grid.doubled
            for index, block in enumerate(blocks):
                x = block(self._ops, x, grid, "plain" if index < len(blocks) - 1 else "to bordered")
        return x, grid

    def _upsample(
        self, upsampling: _Upsampling, x: Tensor, grid: Grid, next_scale: float | None
    ) -> tuple[BorderedImage, Grid]:
        output = upsampling(self._ops, x, grid, True, next_scale)
        return BorderedImage(output[0], output[-1]), grid.doubled

    def _last_block(self, block: ResidualBlock, x: BorderedImage, grid: Grid) -> Tensor:
        hidden, conv, norm, out = block.hidden(self._ops, x, grid), block.conv2, block.norm, self._norm_out
        rest = (norm.gain, norm.bias, x.full, out.gain, out.bias, self._conv_out, norm.eps, grid)
        output: Tensor = self._ops(CONVOLUTION_TAPS, hidden, conv.weight, conv.scale, *rest)
        return output


def _upsampling_of(stage: nn.Module) -> _Upsampling | None:
    """Returns the upsampling of a stage; None for the first."""
    return next((_Upsampling(part) for part in stage.children() if isinstance(part, Upsample)), None)
