"""Writes the fp32 references of a build: inputs and outputs of the modules on real prompts, size by size."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.artifacts.reference import Reference, clean_latent, max_activations, reference_inputs
from engines.backends.base import ModuleName
from engines.build.example_inputs import StaticShape, example_inputs
from engines.build.spec import Size, size_label
from engines.checkpoints.checkpoint import Checkpoint
from engines.models.pixels import PixelDecoder, PixelEncoder
from engines.pipeline.calibration import calibration_prompts

CPU = torch.device("cpu")

# Receives a module and, by submodule, its largest absolute activation.
Measured = Callable[[ModuleName, Mapping[str, float]], None]


def reference_file(size: Size) -> str:
    return f"reference-{size_label(size)}.safetensors"


def write_references(
    checkpoint: Checkpoint,
    fast: Checkpoint | None,
    shapes: Mapping[Size, StaticShape],
    rows: int,
    folder: Path,
    *,
    step: Callable[[str], None],
    measured: Measured,
) -> dict[Size, Path]:
    """Returns the path of each size's reference of `rows` jobs.

    fast: with the second decoder. `measured` is told of each module once its runs are over; an error of it ends the
    build before the next module is read.
    """
    texts = calibration_prompts(checkpoint).rows(rows)
    tensors_of: dict[Size, dict[str, Tensor]] = {}
    module: nn.Module = checkpoint.load_transformer(torch.float32, CPU)
    with torch.inference_mode(), max_activations(module) as peaks:
        for size, shape in shapes.items():
            step(f"reference of the transformer at {size_label(size)}")
            noise = example_inputs("decoder", shape, rows, torch.float32)["latent"]
            latent, time, guidance = reference_inputs(noise)
            inputs = {"latent": latent, "text": texts.states, "timestep": time, "guidance": guidance}
            inputs["text_mask"] = texts.mask
            velocity = module(**inputs)
            tensors_of[size] = {**inputs, "velocity": velocity, "clean": clean_latent(latent, velocity, time)}
    measured("transformer", peaks)
    del module
    autoencoder = checkpoint.load_autoencoder(torch.float32, CPU)
    decoder, encoder = checkpoint.load_pixel_decoder(autoencoder, torch.float32, CPU), PixelEncoder(autoencoder)
    with torch.inference_mode(), max_activations(decoder) as peaks, max_activations(encoder) as encoder_peaks:
        for size, tensors in tensors_of.items():
            step(f"reference of the autoencoder at {size_label(size)}")
            tensors["pixels"] = _decoded(decoder, tensors["clean"])
            tensors["encoded"] = torch.cat([encoder(row[None]) for row in tensors["pixels"]])
    measured("decoder", peaks)
    measured("encoder", encoder_peaks)
    del autoencoder, decoder, encoder
    if fast is not None:
        second = fast.load_pixel_decoder(None, torch.float32, CPU)
        with torch.inference_mode(), max_activations(second) as peaks:
            for size, tensors in tensors_of.items():
                step(f"reference of the fast decoder at {size_label(size)}")
                tensors["fast_pixels"] = _decoded(second, tensors["clean"])
        measured("fast_decoder", peaks)
    paths = {size: folder / reference_file(size) for size in tensors_of}
    for size, path in paths.items():
        Reference(tensors_of[size]).save(path)
    return paths


def _decoded(decoder: PixelDecoder, latents: Tensor) -> Tensor:
    """Returns the pixels of latents, row by row, because one row takes gigabytes at full size."""
    return torch.cat([decoder(row[None])[0] for row in latents])
