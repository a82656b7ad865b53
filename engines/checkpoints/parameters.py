"""Counts the parameters of a checkpoint's components before they are loaded."""

import json
import math
from pathlib import Path

from torch import nn

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.weights import Component, FolderWeights, meta_init, weight_files
from engines.errors import CheckpointError
from engines.models.dcae import Autoencoder
from engines.models.gemma import GemmaBody, GemmaConfig
from engines.models.taesana import TaesanaConfig, TaesanaDecoder
from engines.models.transformer import SprintTransformer

_MAX_HEADER = 100 * 2**20  # bytes; safetensors' own limit


def count_parameters(checkpoint: Checkpoint, part: Component) -> int:
    """Counts from headers of the component's files, or from shapes of random weights or of a .pth file.

    Raises CheckpointError.
    """
    weights = checkpoint.weights
    name, _, half = part.partition(".")
    if isinstance(weights, FolderWeights) and weights.folders[name].suffix != ".pth":
        return count_numbers(weights.folders[name], weights.variant, half)
    with meta_init():
        if part == "text_encoder":
            module: nn.Module = GemmaBody(GemmaConfig.from_dict(checkpoint.text))
        elif part == "transformer":
            module = SprintTransformer(checkpoint.transformer)
        elif part == "decoder":
            module = TaesanaDecoder(checkpoint.taesana or TaesanaConfig())
        elif part == "vae.decoder":
            module = Autoencoder(checkpoint.autoencoder, "decoder")
        else:
            module = Autoencoder(checkpoint.autoencoder, "encoder" if part == "vae.encoder" else None)
    return sum(parameter.numel() for parameter in module.parameters())


def count_numbers(folder: Path, variant: str | None, below: str = "") -> int:
    """Returns the count of numbers in the safetensors files of a component; reads their headers alone.

    below: first word of the keys that count; empty for all. Raises CheckpointError.
    """
    return sum(_numbers(path, f"{below}." if below else "") for path in weight_files(folder, variant))


def _numbers(path: Path, prefix: str) -> int:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, list[int]]] = json.loads(file.read(length) if length <= _MAX_HEADER else b"")
        names = [name for name in header if name != "__metadata__" and name.startswith(prefix)]
        return sum(math.prod(header[name]["shape"]) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
