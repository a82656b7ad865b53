"""Writes checkpoints in the diffusers folder layout, which the server and diffusers' SanaSprintPipeline load."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma2 import Gemma2Model

from engines.models.dcae import Autoencoder
from engines.models.transformer import SprintTransformer

MODEL_INDEX = {
    "_class_name": "SanaSprintPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "SCMScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}
SCHEDULER = {
    "_class_name": "SCMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
}


def write_checkpoint(
    folder: Path,
    transformer: SprintTransformer,
    autoencoder: Autoencoder,
    encoder: Gemma2Model,
    tokenizer: PreTrainedTokenizerFast,
    sprint: Mapping[str, object],
) -> None:
    """Writes all parts in bfloat16 and overwrites old ones; `sprint` is the content of sprint.json."""
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "sprint.json", sprint)
    write_json(folder / "transformer" / "config.json", transformer.config.to_dict())
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer.state_dict())
    write_json(folder / "vae" / "config.json", autoencoder.config.to_dict())
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", autoencoder.state_dict())
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.nn.Module.to(encoder, torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, path, {"format": "pt"})
