"""A published teacher and a folder of pictures, for recipes that train neither autoencoder nor teacher.

    python -m distill.train --recipe sprint_0_6b --out runs/mine --teacher ORG/TEACHER_diffusers --pictures DIR

DIR holds pictures (png, jpg, jpeg, webp) and beside each its caption in a .txt of the same name.
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

from distill.stages.teacher import Teacher, silence_guidance
from distill.training.checkpoint_writer import write_json, write_weights
from distill.training.latents import Latents
from distill.training.stage import to_tensor
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

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT_TOKENS = 300
COPIED = ("tokenizer", "text_encoder", "vae", "scheduler")


@dataclass(frozen=True)
class PublishedCaptioner:
    """Captions read as the server reads prompts: instruction in front, padding dropped."""

    stage: TextStage

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text, mask = join(self.stage.encode(captions))
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return text.clone(), mask.clone()  # clones are no inference tensors, so that autograd may keep them


@dataclass(frozen=True)
class Published:
    """What a teacher's folder holds, ready to be distilled."""

    folder: Path
    teacher: Teacher
    autoencoder: Autoencoder


def open_published(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Published:
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
    return Published(folder, Teacher(with_guidance(transformer), PublishedCaptioner(stage)), autoencoder)


def with_guidance(transformer: SprintTransformer) -> SprintTransformer:
    """The same network with a guidance embedding that adds nothing yet (one that is there already is kept)."""
    if transformer.config.guidance_embeds:
        return transformer
    made = SprintTransformer(replace(transformer.config, guidance_embeds=True))
    moved = {key.replace("time_embed.emb.", "time_embed."): value for key, value in transformer.state_dict().items()}
    fresh = {key: value for key, value in made.state_dict().items() if "guidance_embedder" in key}
    made.load_state_dict(moved | fresh)
    silence_guidance(made)
    return made.to(next(transformer.parameters()).device)


def read_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures and captions of a folder, by name. Raises ValueError for a picture without caption, or for none."""
    pairs = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"--pictures: {path} has no caption; write it into {text.name} beside it")
        pairs.append((path, text.read_text(encoding="utf-8").strip()))
    if not pairs:
        raise ValueError(f"--pictures: {folder} holds none of {', '.join(PICTURES)}")
    return pairs


def square(path: Path, side: int) -> Pixels:
    """The picture, scaled and cut around its middle: uint8 [side, side, 3]."""
    with Image.open(path) as picture:
        return np.asarray(ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS))


def encode_pictures(folder: Path, autoencoder: Autoencoder, side: int, path: Path) -> Latents:
    """Encodes a folder of pictures once; `path` keeps the result for a resumed run."""
    pairs = read_pictures(folder)
    captions = [caption for _, caption in pairs]
    if path.exists():
        kept: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if len(kept["values"]) == len(pairs):
            return Latents(kept["values"], None, lambda row, _: captions[row])
    weight = next(autoencoder.parameters())
    encoded = []
    with torch.no_grad():
        for picture, _ in tqdm(pairs, desc="encode", mininterval=5):
            pixels = to_tensor(square(picture, side)[None]).to(weight.device, weight.dtype)
            encoded.append(autoencoder.encoder(pixels).to("cpu", torch.bfloat16))
    values = torch.cat(encoded) * autoencoder.config.scaling_factor
    aside = path.with_suffix(".part")
    torch.save({"values": values}, aside)
    aside.replace(path)
    return Latents(values, None, lambda row, _: captions[row])


def write_distilled(folder: Path, published: Published, student: SprintTransformer) -> None:
    """The teacher's checkpoint with the student in the transformer's place."""
    for part in COPIED:
        if (published.folder / part).is_dir():
            shutil.copytree(published.folder / part, folder / part, dirs_exist_ok=True)
    write_json(folder / "transformer" / "config.json", student.config.to_dict())
    weights = student.state_dict()
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", weights, torch.bfloat16)
