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
from engines.models.transformer import SprintTransformer

_MAX_HEADER = 100 * 2**20  # bytes; safetensors' own limit


def count_parameters(checkpoint: Checkpoint, part: Component) -> int:
    """Counts from headers of the component's files, or from shapes of random weights. Raises CheckpointError."""
    weights = checkpoint.weights
    if isinstance(weights, FolderWeights):
        return sum(_numbers(path) for path in weight_files(weights.folders[part], weights.variant))
    with meta_init():
        if part == "text_encoder":
            module: nn.Module = GemmaBody(GemmaConfig.from_dict(checkpoint.text))
        elif part == "transformer":
            module = SprintTransformer(checkpoint.transformer)
        else:
            module = Autoencoder(checkpoint.autoencoder)
    return sum(parameter.numel() for parameter in module.parameters())


def _numbers(path: Path) -> int:
    """Returns the count of numbers in a safetensors file; reads its header alone. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, list[int]]] = json.loads(file.read(length) if length <= _MAX_HEADER else b"")
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
