"""A cache of the latents of input images, so that the engine encodes each image once."""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.pipeline.lru_cache import LruCache
from engines.types import Pixels


class LatentCache:
    """Latents of images by their pixels, bounded in bytes."""

    def __init__(self, encode: Callable[[Tensor], Tensor], max_bytes: int = 64 * 2**20):
        self._encode = encode
        self._cache: LruCache[bytes, Tensor] = LruCache(lambda latent: latent.nbytes, max_bytes)

    def latents(self, images: Sequence[Pixels], prepare: Callable[[Pixels], Tensor], size: tuple[int, int]) -> Tensor:
        """Returns [B, C, h, w] of RGB images of any size; `prepare` turns each into [H, W, 3] of `size`."""
        keys = [_digest(image, size) for image in images]
        latents = {key: latent for key in keys if (latent := self._cache.get(key)) is not None}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in latents}
        if missing:
            encoded = self._encode(torch.stack([prepare(image) for image in missing.values()]))
            for key, latent in zip(missing, encoded.unbind(), strict=True):
                latents[key] = latent
                self._cache.put(key, latent.clone())
        return torch.stack([latents[key] for key in keys])


def resized(image: Pixels, width: int, height: int) -> Tensor:
    """Returns RGB [H, W, 3] of any size stretched to [height, width, 3] uint8, bicubic with antialiasing."""
    if image.shape[:2] == (height, width):
        return torch.tensor(image)
    planes = torch.tensor(image).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)


def _digest(image: Pixels, size: tuple[int, int]) -> bytes:
    digest = hashlib.blake2b(f"{image.shape} {size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()
