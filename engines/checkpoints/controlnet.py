"""Loads the ControlNet of a checkpoint: from its folder `controlnet/`, or from another folder or hub id."""

import torch

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.hub import find_folder
from engines.checkpoints.weights import FolderWeights, meta_init, read_json
from engines.errors import CheckpointError
from engines.models.controlnet import ControlConfig, ControlNet

FOLDER = "controlnet"
_SHARED = ("in_channels", "caption_channels", "num_attention_heads", "attention_head_dim")


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
    if name is not None:
        folder = find_folder(name, FOLDER, variant)
        folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    elif isinstance(checkpoint.weights, FolderWeights):
        folder = checkpoint.weights.folders["transformer"].parent / FOLDER
        if not folder.is_dir():
            return None
    else:
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
