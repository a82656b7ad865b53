"""LoRA files of random factors, for any linear maps and 1x1 convolutions of a transformer."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

EVERYWHERE = (
    *("patch_embed.proj", "time_embed.timestep_embedder.linear_1", "time_embed.guidance_embedder.linear_2"),
    *("time_embed.linear", "caption_projection.linear_1", "proj_out"),
    *(
        f"transformer_blocks.{block}.{attention}.{part}"
        for block in (0, 1)
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    *(f"transformer_blocks.1.ff.{part}" for part in ("conv_inverted", "conv_point")),
)


def random_factors(
    transformer: nn.Module, modules: Iterable[str], rank: int, seed: int, size: float = 0.5
) -> dict[str, Tensor]:
    """Keys and tensors as diffusers writes them, each product of about `size` times the gain of its weight."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        weight = transformer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        tail = (1,) * (weight.ndim - 2)
        out, inputs = weight.shape[:2]
        down = torch.randn(rank, inputs, *tail, generator=generator) * inputs**-0.5
        up = torch.randn(out, rank, *tail, generator=generator) * size * rank**-0.5
        found |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return found


def save_lora(path: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    """config: peft's LoraConfig, as diffusers keeps it in the file."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, path, metadata)
    return path
