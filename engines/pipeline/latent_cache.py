"""Latents of images that came before, so that a drawing or a picture is encoded once."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.types import Pixels


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


def resized(image: Pixels, width: int, height: int) -> Tensor:
    """RGB [H, W, 3] of any size stretched to [height, width, 3] uint8, bicubic with antialiasing."""
    if image.shape[:2] == (height, width):
        return torch.tensor(image)
    planes = torch.tensor(image).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)


def _digest(image: Pixels, size: tuple[int, int]) -> bytes:
    digest = hashlib.blake2b(f"{image.shape} {size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()
