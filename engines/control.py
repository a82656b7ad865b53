"""Drawings as the engine uses them: the ControlNet of a checkpoint, and the latents of drawings, kept while they stand.

A ControlNet lies in the folder `controlnet/` of a checkpoint, or anywhere else by name. Encoding a drawing costs nearly
as much as decoding a picture, and a drawing often stands still while prompt, seed and steps change.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engines.checkpoint import Checkpoint, find_folder
from engines.errors import CheckpointError
from engines.models.controlnet import ControlConfig, ControlNet
from engines.types import Pixels
from engines.weights import FolderWeights, read_json, unfilled

FOLDER = "controlnet"
_SHARED = ("in_channels", "caption_channels", "num_attention_heads", "attention_head_dim")


def load_controlnet(
    checkpoint: Checkpoint,
    name: str | None,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> ControlNet | None:
    """The ControlNet `name` (a folder or hub id), or else the one in the checkpoint's own folder; None without either.

    Raises CheckpointError where it cannot be found, is damaged, or belongs to another transformer.
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
    given = read_json(folder / "config.json")
    if given.get("_class_name") != "SanaControlNetModel":
        raise CheckpointError(f"{folder}: holds a {given.get('_class_name')}; a SanaControlNetModel is needed")
    try:
        config = ControlConfig.from_dict(given)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json: {error}") from error
    mine, theirs = config.copies, checkpoint.transformer
    for key in _SHARED:
        if getattr(mine, key) != getattr(theirs, key):
            raise CheckpointError(
                f"{folder}: {key} is {getattr(mine, key)}, the transformer's {getattr(theirs, key)}; it was made for "
                "another checkpoint"
            )
    if mine.num_layers >= theirs.num_layers:
        raise CheckpointError(
            f"{folder}: num_layers is {mine.num_layers}; fewer than the transformer's {theirs.num_layers} are needed"
        )
    with unfilled():
        module = ControlNet(config)
    FolderWeights({"controlnet": folder}, variant).fill("controlnet", module, dtype, device)
    return module.eval()


class LatentCache:
    """Latents by the pixels that they were encoded from: least recently used go first, bounded in bytes."""

    def __init__(self, encode: Callable[[Tensor], Tensor], max_bytes: int = 64 * 2**20):
        self._encode, self._max_bytes = encode, max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def latents(self, images: Sequence[Pixels], prepare: Callable[[Pixels], Tensor], size: tuple[int, int]) -> Tensor:
        """[B, C, h, w] of RGB images of any size; `prepare` makes each the [H, W, 3] that is encoded, of `size`."""
        keys = [_digest(image, size) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._kept}
        found = {key: self._kept[key] for key in keys if key in self._kept}
        if missing:
            encoded = self._encode(torch.stack([prepare(image) for image in missing.values()]))
            found |= dict(zip(missing, encoded.unbind(), strict=True))
        for key, latent in found.items():
            self._kept[key] = latent.clone() if key in missing else latent
            self._kept.move_to_end(key)
        while sum(latent.nbytes for latent in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def _digest(image: Pixels, size: tuple[int, int]) -> bytes:
    digest = hashlib.blake2b(f"{image.shape} {size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()
