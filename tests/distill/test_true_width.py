"""The paper's recipe runs at the 0.6B's true width from a teacher without guidance embedding."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from distill.recipes import sprint_0_6b
from distill.stages.published_teacher import open_published_teacher
from distill.train import Run
from distill.training.checkpoint_writer import write_json, write_weights
from engines.checkpoints.checkpoint import open_checkpoint
from engines.checkpoints.random_weights import RandomWeights
from engines.models.gemma import GemmaBody, GemmaConfig

CPU = torch.device("cpu")
TEXT = {"model_type": "gemma2", "vocab_size": 1000, "num_hidden_layers": 2, "final_logit_softcapping": 30.0}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Returns a folder of random weights: all widths as published, but two layers and 1,000 tokens of Gemma."""
    source, folder = open_checkpoint("random:sprint-0.6b"), tmp_path / "teacher"
    config = replace(source.transformer, guidance_embeds=False)
    weights = {
        key.replace("time_embed.timestep", "time_embed.emb.timestep"): value
        for key, value in source.load_transformer(torch.bfloat16, CPU).state_dict().items()
        if "guidance_embedder" not in key
    }
    write_part(folder / "transformer", config.to_dict(), weights, "diffusion_pytorch_model.safetensors")
    autoencoder = source.load_autoencoder(torch.bfloat16, CPU)
    write_part(
        folder / "vae", source.autoencoder.to_dict(), autoencoder.state_dict(), "diffusion_pytorch_model.safetensors"
    )
    body = GemmaBody(GemmaConfig.from_dict(TEXT))
    RandomWeights().load_into("text_encoder", body, torch.bfloat16, CPU)
    write_part(folder / "text_encoder", TEXT, body.state_dict(), "model.safetensors")
    (folder / "tokenizer").mkdir()
    source.load_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def write_part(folder: Path, config: Mapping[str, object], weights: Mapping[str, torch.Tensor], name: str) -> None:
    write_json(folder / "config.json", config)
    write_weights(folder / name, weights)


@pytest.mark.slow
def test_the_papers_recipe_at_true_width(teacher: Path, tmp_path: Path) -> None:
    """One update of the student and one of the discriminator, at 256x256; some 20 GB of memory and 14 of disk."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        Image.new("RGB", (300, 256), (90 * index, 60, 200)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(f"image {index}")
    recipe = sprint_0_6b()
    recipe = replace(recipe, image_size=256, distil=replace(recipe.distil, steps=2, batch=2, warmup=1))
    folder = tmp_path / "run"
    folder.mkdir()

    student = Run(recipe, folder, Accelerator(), open_published_teacher(str(teacher), CPU), images).student
    assert sum(parameter.numel() for parameter in student.parameters()) > 5.9e8
    assert student.config.guidance_embeds
    before = open_published_teacher(str(teacher), CPU).teacher.transformer.state_dict()
    moved = [key for key, value in student.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > 0.75 * len(before)
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    assert (folder / "latents.pt").is_file()
    assert (folder / "student.pt").is_file()
