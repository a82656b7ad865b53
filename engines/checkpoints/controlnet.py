"""Loads the ControlNet of a checkpoint: from its folder `controlnet/`, or from another folder or hub id."""

from pathlib import Path

import torch

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.hub import find_folder
from engines.checkpoints.weights import FolderWeights, meta_init, read_json
from engines.errors import CheckpointError
from engines.models.controlnet import ControlConfig, ControlNet

FOLDER = "controlnet"
_SHARED = ("in_channels", "caption_channels", "num_attention_heads", "attention_head_dim")


def controlnet_folder(checkpoint: Checkpoint, name: str | None, variant: str | None = None) -> Path | None:
    """Returns the folder of the ControlNet `name`, or the checkpoint's own; None without either.

    Downloads it from the hub if needed. Raises CheckpointError.
    """
    if name is not None:
        folder = find_folder(name, FOLDER, variant)
        return folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not isinstance(checkpoint.weights, FolderWeights):
        return None
    own = checkpoint.weights.folders["transformer"].parent / FOLDER
    return own if own.is_dir() else None


def load_controlnet(
    checkpoint: Checkpoint,
    name: str | None,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> ControlNet | None:
    """Returns the ControlNet `name` (a folder or hub id), or that of the checkpoint's own folder; None without either.

    Raises CheckpointError if it is missing, damaged, or made for another transformer.
    """
    folder = controlnet_folder(checkpoint, name, variant)
    if folder is None:
        return None
    fields = read_json(folder / "config.json")
    if fields.get("_class_name") != "SanaControlNetModel":
        raise CheckpointError(f"{folder}: holds a {fields.get('_class_name')}; a SanaControlNetModel is needed")
    try:
        config = ControlConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json: {error}") from error
    branch, base = config.copies, checkpoint.transformer
    for key in _SHARED:
        if getattr(branch, key) != getattr(base, key):
            raise CheckpointError(
                f"{folder}: {key} is {getattr(branch, key)}, the transformer's {getattr(base, key)}; it was made for "
                "another checkpoint"
            )
    if branch.num_layers >= base.num_layers:
        raise CheckpointError(
            f"{folder}: num_layers is {branch.num_layers}; fewer than the transformer's {base.num_layers} are needed"
        )
    with meta_init():
        module = ControlNet(config)
    FolderWeights({"controlnet": folder}, variant).load_into("controlnet", module, dtype, device)
    return module.eval()
