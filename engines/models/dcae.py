"""DC-AE, the deep-compression autoencoder of SANA: pixels <-> 32-channel latents at 1/32 of the side (f32c32).

Deterministic (no KL). Stages are ResBlocks (high resolution) or EfficientViT blocks (low resolution: multi-scale ReLU
linear attention and a gated convolution). Covers dc-ae-f32c32-sana-1.0/1.1 ("interpolate" upsampling), DC-AE-Lite
("pixel_shuffle", no full-resolution stage) and the tiny autoencoder trained here.

Sources: DC-AE (arXiv 2410.10733); diffusers models/autoencoders/autoencoder_dc.py, whose parameter names these are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import CheckpointError
from engines.models.layers import GLUMBConv, RMSNorm

BlockType = Literal["ResBlock", "EfficientViTBlock"]

ATTENTION_EPS = 1e-15


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of the architecture, highest resolution first; defaults are dc-ae-f32c32-sana-1.1."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[BlockType, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: tuple[BlockType, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    downsample_block_type: Literal["Conv", "conv", "pixel_unshuffle"] = "Conv"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Literal["relu", "silu"] = "relu"
    scaling_factor: float = 0.41407

    @property
    def compression(self) -> int:
        """Pixels per latent cell along each side."""
        return 1 << (len(self.decoder_block_out_channels) - 1)

    def to_dict(self) -> dict[str, object]:
        """Returns the vae/config.json that diffusers and `from_dict` read."""
        return {"_class_name": "AutoencoderDC", "_diffusers_version": "0.42.1", **asdict(self)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """Reads vae/config.json. Raises CheckpointError with the key that is unknown or not supported."""
        known = {field.name for field in fields(cls)}
        values = {key: _tuples(value) for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise CheckpointError(f"autoencoder config: unknown keys {', '.join(unknown)}; known are {sorted(known)}")
        stages = len(values.get("decoder_block_out_channels", cls.decoder_block_out_channels))
        for key in ("encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns"):
            if isinstance(values.get(key), str):
                values[key] = (values[key],) * stages
        parsed = cls(**({"decoder_norm_types": ("rms_norm",) * stages, "decoder_act_fns": ("silu",) * stages} | values))
        for key, allowed in {
            "decoder_norm_types": {"rms_norm"},
            "decoder_act_fns": {"silu"},
            "encoder_block_types": {"ResBlock", "EfficientViTBlock"},
            "decoder_block_types": {"ResBlock", "EfficientViTBlock"},
            "upsample_block_type": {"interpolate", "pixel_shuffle"},
            "downsample_block_type": {"Conv", "conv", "pixel_unshuffle"},
            "decoder_conv_act_fn": {"relu", "silu"},
        }.items():
            value = getattr(parsed, key)
            unsupported = (set(value) if isinstance(value, tuple) else {value}) - allowed
            if unsupported:
                raise CheckpointError(
                    f"autoencoder config: {key} is {sorted(unsupported)}, supported are {sorted(allowed)}"
                )
        return parsed


# dc-ae-lite-f32c32-sana-1.1 (diffusers pull request 12169): the same encoder, a decoder of ResBlocks alone.
DC_AE_LITE = AutoencoderConfig(
    decoder_block_types=("ResBlock",) * 6,
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


class ResBlock(nn.Module):
    """conv, SiLU, conv, RMSNorm over channels, residual. [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels, bias=True, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv2(F.silu(self.conv1(x))))
        return x + y


class MultiscaleProjection(nn.Module):
    """Depthwise kxk and grouped 1x1 over the 3C channels of q, k, v: the second scale of the attention."""

    def __init__(self, channels: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(
            3 * channels, 3 * channels, kernel, padding=kernel // 2, groups=3 * channels, bias=False
        )
        self.proj_out = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_out(self.proj_in(x))
        return y


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over all positions at one or more scales. [B,C,H,W] -> [B,C,H,W].

    Source: EfficientViT (arXiv 2205.14756); diffusers models/attention_processor.py SanaMultiscaleLinearAttention.
    """

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(inner, heads, kernel) for kernel in kernels)
        self.to_out = nn.Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm_out = RMSNorm(channels, bias=True, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])[:, :, None, None]
        qkv = F.conv2d(x, weight)  # [B, 3C, H, W]
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        out = attend(scales, self.head_dim)
        y: Tensor = self.norm_out(F.conv2d(out, self.to_out.weight[:, :, None, None]))
        return x + y


def attend(scales: Tensor, head_dim: int) -> Tensor:
    """Attends within each scale: queries, keys and values [B,3C*S,H,W] of S scales to [B,C*S,H,W].

    Quadratic order where H*W <= head_dim, as upstream: cheaper there, and it rounds differently.
    """
    batch, _, height, width = scales.shape
    # Upstream's grouping: the concatenated channels are cut into runs of 3*head_dim, each run a (q, k, v).
    grouped = scales.reshape(batch, -1, 3 * head_dim, height * width)
    linear = height * width > head_dim
    if linear:
        grouped = grouped.float()
    q, k, v = grouped.chunk(3, dim=2)  # [B, heads*scales, head_dim, N]
    q, k = F.relu(q), F.relu(k)
    if linear:
        out = torch.matmul(torch.matmul(v, k.transpose(-1, -2)), q)
        total = torch.matmul(
            k.sum(dim=-1, keepdim=True).transpose(-1, -2), q
        )  # upstream's row of ones, without materialising it
        out = (out / (total + ATTENTION_EPS)).to(scales.dtype)
    else:
        scores = torch.matmul(k.transpose(-1, -2), q).float()
        scores = scores / (scores.sum(dim=2, keepdim=True) + ATTENTION_EPS)
        out = torch.matmul(v, scores.to(v.dtype))
    return out.reshape(batch, -1, height, width)


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolution; both residual. [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernels)
        self.conv_out = GLUMBConv(channels, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_out(self.attn(x))
        return y


class Downsample(nn.Module):
    """[B,C,H,W] -> [B,C',H/2,W/2] by a strided (or unshuffled) convolution, plus an averaging shortcut."""

    def __init__(self, channels: int, out_channels: int, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.group = channels * 4 // out_channels if shortcut else 0
        width = out_channels // 4 if unshuffle else out_channels
        self.conv = nn.Conv2d(channels, width, 3, stride=1 if unshuffle else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        if self.group:
            y = y + _group_mean(F.pixel_unshuffle(x, 2), self.group)
        return y


class Upsample(nn.Module):
    """[B,C,H,W] -> [B,C',2H,2W] by nearest + convolution (or convolution + shuffle), plus a repeating shortcut."""

    def __init__(self, channels: int, out_channels: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.repeats = out_channels * 4 // channels if shortcut else 0
        self.conv = nn.Conv2d(channels, out_channels if interpolate else out_channels * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        if self.repeats:
            y = y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return y


def _group_mean(x: Tensor, group: int) -> Tensor:
    """Averages runs of `group` channels. [B,C,H,W] -> [B,C/group,H,W]."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels // group, group, height, width).mean(dim=2)


def _block(kind: BlockType, channels: int, head_dim: int, kernels: tuple[int, ...]) -> nn.Module:
    return ResBlock(channels) if kind == "ResBlock" else EfficientViTBlock(channels, head_dim, kernels)


class Encoder(nn.Module):
    """RGB [B,3,32h,32w] in [-1,1] -> latent [B,32,h,w], to be multiplied by scaling_factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, depths = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.conv_in: nn.Module = (
            nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
            if depths[0] > 0
            else Downsample(config.in_channels, widths[1], unshuffle, shortcut=False)
        )
        self.down_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            kind, kernels = config.encoder_block_types[i], config.encoder_qkv_multiscales[i]
            stage = [_block(kind, width, config.attention_head_dim, kernels) for _ in range(depth)]
            if i < len(widths) - 1 and depth > 0:
                stage.append(Downsample(width, widths[i + 1], unshuffle))
            self.down_blocks.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.group = widths[-1] // config.latent_channels if config.encoder_out_shortcut else 0

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for stage in self.down_blocks:
            x = stage(x)
        latent: Tensor = self.conv_out(x)
        return latent + _group_mean(x, self.group) if self.group else latent


class Decoder(nn.Module):
    """Latent [B,32,h,w], already divided by scaling_factor -> RGB [B,3,32h,32w] in about [-1,1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, depths = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        self.repeats = widths[-1] // config.latent_channels if config.decoder_in_shortcut else 0
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            kind, kernels = config.decoder_block_types[i], config.decoder_qkv_multiscales[i]
            stage = [_block(kind, width, config.attention_head_dim, kernels) for _ in range(depth)]
            if i < len(widths) - 1 and depth > 0:
                stage.insert(0, Upsample(widths[i + 1], width, interpolate))
            self.up_blocks.append(nn.Sequential(*stage))
        last = widths[0] if depths[0] > 0 else widths[1]
        self.norm_out = RMSNorm(last, bias=True, dim=1)
        self.act = F.relu if config.decoder_conv_act_fn == "relu" else F.silu
        self.conv_out: nn.Module = (
            nn.Conv2d(last, config.in_channels, 3, padding=1)
            if depths[0] > 0
            else Upsample(last, config.in_channels, interpolate, shortcut=False)
        )

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        if self.repeats:
            x = x + latent.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        pixels: Tensor = self.conv_out(self.act(self.norm_out(x)))
        return pixels


class Autoencoder(nn.Module):
    """Encoder and decoder of a checkpoint's vae/ folder, or the one of them that `part` names."""

    def __init__(self, config: AutoencoderConfig, part: Literal["encoder", "decoder"] | None = None) -> None:
        super().__init__()
        self.config = config
        if part != "decoder":
            self.encoder = Encoder(config)
        if part != "encoder":
            self.decoder = Decoder(config)
