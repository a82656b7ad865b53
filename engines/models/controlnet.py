"""ControlNet for the Sprint transformer: copies of its first blocks turn the latent of a drawing into residuals.

Parameter names are those of diffusers' SanaControlNetModel, so its checkpoints load unchanged. The keys
guidance_embeds, qk_norm and injection of config.json are ours, because upstream has no Sprint ControlNet. Two different
graphs are published for the same weights (x: the transformer's input or stream, h: the drawing, i: index of a copy):

    diffusers  c = patches(x) + input(h);  c = copy_i(c);  zero_i(c) is added to the output of block i + 1
    nvlabs     c = block_0(patches(x)) + input(h), h without positions;  zero_i(c) is added to the output of block i

Sources: paper 3.4; diffusers models/controlnets/controlnet_sana.py; NVlabs sana_multi_scale_controlnet.py.

Shapes: B jobs, C latent channels, h x w latent, N = h*w image tokens, T text tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from engines.models.embeddings import MLP, PatchEmbed, TimeEmbed, TimeGuidanceEmbed
from engines.models.layers import RMSNorm
from engines.models.transformer import (
    Block,
    SprintTransformer,
    TransformerConfig,
    after_next_block,
    attention_bias,
)

Injection = Literal["diffusers", "nvlabs"]

_LAYERS = 7  # upstream's default


@dataclass(frozen=True)
class ControlConfig:
    """Configuration of the copied blocks (`copies.num_layers` of them), and the graph that the weights need."""

    copies: TransformerConfig
    injection: Injection = "diffusers"

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "ControlConfig":
        """Reads a diffusers controlnet/config.json. Raises ValueError with the key of an unsupported value."""
        values = {"num_layers": _LAYERS, **config}
        injection = values.pop("injection", "diffusers")
        if injection not in get_args(Injection):
            raise ValueError(f"injection: got {injection!r}, supported: {', '.join(get_args(Injection))}")
        return cls(TransformerConfig.from_dict(values), cast(Injection, injection))

    def to_dict(self) -> dict[str, object]:
        """Returns the config.json that `from_dict` reads."""
        return {**self.copies.to_dict(), "_class_name": "SanaControlNetModel", "injection": self.injection}


class ControlNet(nn.Module):
    """The copied blocks with their own embeddings, and projections that are zero before training."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.config = config
        copies = config.copies
        self.patch_embed = PatchEmbed(copies.in_channels, copies.dim, copies.sample_size, copies.interpolation_scale)
        self.time_embed = TimeGuidanceEmbed(copies.dim) if copies.guidance_embeds else TimeEmbed(copies.dim)
        self.caption_projection = MLP(copies.caption_channels, copies.dim, nn.GELU(approximate="tanh"))
        self.caption_norm = RMSNorm(copies.dim)
        self.transformer_blocks = nn.ModuleList(Block(copies) for _ in range(copies.num_layers))
        self.input_block = nn.Linear(copies.dim, copies.dim)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(copies.dim, copies.dim) for _ in range(copies.num_layers))

    @classmethod
    def of(cls, transformer: SprintTransformer, copies: int, injection: Injection = "diffusers") -> "ControlNet":
        """Returns a ControlNet to train: copies of the transformer's first blocks and embeddings, zero projections."""
        controlnet = cls(ControlConfig(replace(transformer.config, num_layers=copies), injection))
        copied = transformer.state_dict()
        own = controlnet.state_dict()
        controlnet.load_state_dict({name: copied.get(name, torch.zeros_like(value)) for name, value in own.items()})
        return controlnet

    def residuals(
        self,
        x: Tensor,
        control: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text_mask: Tensor | None,
    ) -> list[Tensor]:
        """Returns one residual [B, N, D] per copy.

        x: the noisy latent [B, C, h, w] ("diffusers"), or the tokens [B, N, D] after the transformer's first block
        ("nvlabs"); control: the drawing's latent [B, C, h, w]; other arguments as in SprintTransformer.forward.
        """
        if not self.config.copies.guidance_embeds:
            guidance = None
        modulation, _ = self.time_embed(timestep, guidance)
        modulation = torch.unflatten(modulation, 1, (6, -1))
        projected = self.caption_norm(self.caption_projection(text))
        bias = None if text_mask is None else attention_bias(text_mask, text.dtype)
        if self.config.injection == "diffusers":
            x, hint = self.patch_embed(x), self.patch_embed(control)
        else:
            hint = self.patch_embed.proj(control).flatten(2).transpose(1, 2)
        x = x + self.input_block(hint)
        residuals = []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x = block(x, projected, modulation, bias, (control.shape[-2], control.shape[-1]))
            residuals.append(project(x))
        return residuals


class ControlledTransformer(nn.Module):
    """Transformer and ControlNet as one module, which a backend executes as one graph."""

    def __init__(self, transformer: SprintTransformer, controlnet: ControlNet):
        super().__init__()
        self.transformer = transformer
        self.controlnet = controlnet

    def forward(
        self,
        latent: Tensor,
        text: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text_mask: Tensor | None,
        control: Tensor,
        control_scale: Tensor,
    ) -> Tensor:
        """Returns the flow velocity v [B, C, h, w].

        control: the drawing's latent [B, C, h, w]; control_scale [B]: 0 gives exactly the transformer's own velocity;
        other arguments as in SprintTransformer.forward.
        """
        base = self.transformer
        dtype = base.proj_out.weight.dtype  # may differ from the engine's, whose other modules may be built artifacts
        latent, text, control = latent.to(dtype), text.to(dtype), control.to(dtype)
        scale = control_scale.to(dtype)[:, None, None]
        modulation, embedded = base.conditioning(timestep, guidance)

        def scaled_residuals(x: Tensor) -> list[Tensor]:
            residuals = self.controlnet.residuals(x, control, text, timestep, guidance, text_mask)
            return [residual * scale for residual in residuals]

        def after_own_block(index: int, x: Tensor) -> Tensor:
            if index == 0:
                residuals.extend(scaled_residuals(x))
            return x + residuals[index] if index < len(residuals) else x

        residuals: list[Tensor] = []
        diffusers = self.controlnet.config.injection == "diffusers"
        inject = after_next_block(scaled_residuals(latent)) if diffusers else after_own_block
        return base.velocity(latent, base.project_text(text), modulation, embedded, text_mask, inject)
