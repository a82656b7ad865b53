"""A published teacher and a folder of images, for recipes that train neither autoencoder nor teacher.

    python -m distill.train --recipe sprint_0_6b --out runs/mine --teacher ORG/TEACHER_diffusers --images DIR

DIR holds images (png, jpg, jpeg, webp), and beside each its caption in a .txt file of the same name.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from distill.stages.teacher import Teacher, zero_guidance
from distill.training.checkpoint_writer import write_json, write_weights
from distill.training.latents import Latents
from distill.training.stage import save_atomically, to_tensor
from engines.checkpoints.hub import find_folder
from engines.checkpoints.weights import FolderWeights, read_json
from engines.errors import CheckpointError
from engines.models.dcae import Autoencoder, AutoencoderConfig
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.instruction import INSTRUCTION
from engines.models.text_encoder import TextEncoder
from engines.models.transformer import SprintTransformer, TransformerConfig
from engines.pipeline.prompt_tokenizer import PromptTokenizer
from engines.pipeline.text_stage import TextStage, join
from engines.types import Pixels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT_TOKENS = 300
COPIED_PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")


@dataclass(frozen=True)
class PublishedCaptioner:
    """Encodes captions as the server encodes prompts: after the instruction, without padding."""

    stage: TextStage

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text, mask = join(self.stage.encode(captions))
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return text.clone(), mask.clone()  # autograd cannot save the inference tensors themselves


@dataclass(frozen=True)
class PublishedTeacher:
    """A teacher and its autoencoder from a folder, ready to distil."""

    folder: Path
    teacher: Teacher
    autoencoder: Autoencoder


def open_published_teacher(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PublishedTeacher:
    """Loads a teacher in the diffusers layout (folder or hub id). Raises CheckpointError."""
    folder = find_folder(name)
    weights = FolderWeights({part: folder / part for part in ("transformer", "vae", "text_encoder", "tokenizer")})
    try:
        config = TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: transformer/config.json: {error}") from error
    try:
        text = GemmaConfig.from_dict(read_json(folder / "text_encoder" / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: text_encoder/config.json: {error}") from error
    if config.qk_norm is None:
        raise CheckpointError(f"{folder}: no QK-norm; a Sprint teacher (dense time, QK-norm) is needed, see paper 3.2")
    with torch.device("meta"):
        transformer = SprintTransformer(config)
        autoencoder = Autoencoder(AutoencoderConfig.from_dict(read_json(folder / "vae" / "config.json")))
        body = GemmaBody(text)
    weights.load_into("transformer", transformer, torch.float32, device)
    weights.load_into("vae", autoencoder, dtype, device)
    weights.load_into("text_encoder", body, dtype, device)
    tokenizer = PromptTokenizer(weights.tokenizer(), INSTRUCTION, PROMPT_TOKENS)
    stage = TextStage(tokenizer, TextEncoder(body, tokenizer.prefix))
    return PublishedTeacher(folder, Teacher(with_guidance(transformer), PublishedCaptioner(stage)), autoencoder)


def with_guidance(transformer: SprintTransformer) -> SprintTransformer:
    """Returns the network with a guidance embedding of zero, or unchanged if it has a guidance embedding."""
    if transformer.config.guidance_embeds:
        return transformer
    extended = SprintTransformer(replace(transformer.config, guidance_embeds=True))
    moved = {key.replace("time_embed.emb.", "time_embed."): value for key, value in transformer.state_dict().items()}
    fresh = {key: value for key, value in extended.state_dict().items() if "guidance_embedder" in key}
    extended.load_state_dict(moved | fresh)
    zero_guidance(extended)
    return extended.to(next(transformer.parameters()).device)


def read_captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Lists a folder's images and captions by name. Raises ValueError for a missing caption or an empty folder."""
    pairs = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"--images: {path} has no caption; write it into {text.name} beside it")
        pairs.append((path, text.read_text(encoding="utf-8").strip()))
    if not pairs:
        raise ValueError(f"--images: {folder} holds none of {', '.join(IMAGE_SUFFIXES)}")
    return pairs


def read_square(path: Path, side: int) -> Pixels:
    """Reads an image, scales it and crops its middle: uint8 [side, side, 3]."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS))


def encode_images(folder: Path, autoencoder: Autoencoder, side: int, path: Path) -> Latents:
    """Encodes a folder of images, or reads the latents from `path` if an earlier run saved them."""
    pairs = read_captioned_images(folder)
    captions = [caption for _, caption in pairs]
    if path.exists():
        cached: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if len(cached["values"]) == len(pairs):
            return Latents(cached["values"], None, lambda row, _: captions[row])
    weight = next(autoencoder.parameters())
    encoded = []
    with torch.no_grad():
        for image, _ in tqdm(pairs, desc="encode", mininterval=5):
            pixels = to_tensor([read_square(image, side)]).to(weight.device, weight.dtype)
            encoded.append(autoencoder.encoder(pixels).to("cpu", torch.bfloat16))
    values = torch.cat(encoded) * autoencoder.config.scaling_factor
    save_atomically({"values": values}, path)
    return Latents(values, None, lambda row, _: captions[row])


def write_distilled(folder: Path, source: Path, student: SprintTransformer) -> None:
    """Writes the checkpoint of folder `source` with the student as its transformer."""
    for part in COPIED_PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    write_json(folder / "transformer" / "config.json", student.config.to_dict())
    weights = student.state_dict()
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", weights)
