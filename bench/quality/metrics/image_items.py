"""The images of a metric: paths, prompts, and batches of tensors."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.harness.errors import BenchError
from bench.quality.images.folder import ImageFolder

ENDINGS = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # pytorch-fid's
THREADS = 4  # that decode the next batch while the network is at this one

Prepare = Callable[[Image.Image], Tensor]  # RGB image -> [3, H, W]


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image file. `prompt` and `tag` are None if unknown."""

    path: Path
    prompt: str | None = None
    tag: str | None = None


def read_images(folder: Path) -> list[ImageItem]:
    """Reads a folder in name order: one of bench.quality.images with prompts, any other without.

    Raises BenchError if it has no images, or if files of a bench.quality.images folder are missing or changed.
    """
    if (folder / "manifest.json").is_file():
        images = ImageFolder(folder)
        expected, finished = int(images.manifest()["identity"]["files"]), images.finished()
        if len(finished) < expected:
            raise BenchError(f"{folder}: {len(finished)} of {expected} images are there; make the others first")
        return [ImageItem(images.images / name, finished[name].prompt, finished[name].tag) for name in sorted(finished)]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not found:
        raise BenchError(f"{folder}: holds no images; needed is a folder of them")
    return [ImageItem(path) for path in found]


def with_prompts(items: Sequence[ImageItem], metric: str) -> list[tuple[Path, str]]:
    """Returns paths and prompts. Raises BenchError if a prompt is unknown."""
    pairs = [(item.path, item.prompt) for item in items if item.prompt is not None]
    if len(pairs) < len(items):
        raise BenchError(f"{metric}: needs the prompt of every image; needed is a folder of bench.quality.images")
    return pairs


def batches(paths: Sequence[Path], prepare: Prepare, size: int) -> Iterator[Tensor]:
    """Yields [B, 3, H, W] of `size` images in order, and decodes the next batch meanwhile."""
    with ThreadPoolExecutor(THREADS) as pool:
        groups = [paths[first : first + size] for first in range(0, len(paths), size)]
        pending = [pool.submit(_stacked, groups[0], prepare)]
        for index in range(len(groups)):
            if index + 1 < len(groups):
                pending.append(pool.submit(_stacked, groups[index + 1], prepare))
            yield pending.pop(0).result()


def _stacked(paths: Sequence[Path], prepare: Prepare) -> Tensor:
    return torch.stack([prepare(_opened(path)) for path in paths])


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def as_tensor(image: Image.Image) -> Tensor:
    """Returns [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def center_crop(size: int) -> Prepare:
    """Resizes the shorter side to `size` (bilinear, antialiased) and crops the central square, in [0, 1].

    Equals torchvision's Resize, CenterCrop and ToTensor, which NVlabs' tools/metrics/pytorch-fid/compute_fid.py applies
    to both sets.
    """

    def prepare(image: Image.Image) -> Tensor:
        short, long = sorted(image.size)
        sides = (size, int(size * long / short))
        resized = image.resize(sides if image.width <= image.height else sides[::-1], Image.Resampling.BILINEAR)
        left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
        return as_tensor(resized.crop((left, top, left + size, top + size)))

    return prepare
