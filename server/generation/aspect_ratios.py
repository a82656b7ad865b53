"""Aspect ratios by name, and the size that each means for an engine.

Source of the sizes: ASPECT_RATIO_1024 of NVlabs' diffusion/data/datasets/utils.py, the buckets that the published
checkpoints are trained at (ASPECT_RATIO_1024_BIN in diffusers). Upstream's buckets for 512 and 2048 are half and twice
as large.
"""

import math
from collections.abc import Mapping

from engines.types import Limits

BUCKETS_1024: Mapping[str, tuple[int, int]] = {  # width:height -> width, height in pixels
    "1:1": (1024, 1024),
    "5:4": (1088, 896),
    "4:5": (896, 1088),
    "4:3": (1152, 896),
    "3:4": (896, 1152),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "2:1": (1408, 704),
    "1:2": (704, 1408),
    "21:9": (1536, 640),
    "9:21": (640, 1536),
    "3:1": (1728, 576),
    "1:3": (576, 1728),
    "4:1": (2048, 512),
    "1:4": (512, 2048),
}

_TRAINED_SIDES = (512, 1024, 2048)  # of the squares that upstream has buckets around
_SAME_AREA = 0.05  # a bucket's area differs from its square's by up to 8 %, the root of it by half as much
_SAME_SHAPE = 0.1  # of the logarithm of width / height


def sizes_by_ratio(limits: Limits) -> dict[str, tuple[int, int]]:
    """Name of an aspect ratio -> (width, height) in pixels, of those that an engine of these limits can run.

    An engine whose default size has about the area of 512x512, 1024x1024 or 2048x2048 takes upstream's buckets. Another
    one takes the allowed size that is nearest in shape and about as large as its default size.
    """
    side = math.sqrt(math.prod(limits.default_size))
    trained = [known for known in _TRAINED_SIDES if abs(side / known - 1) < _SAME_AREA]
    sizes = {}
    for name, (width, height) in BUCKETS_1024.items():
        if trained:
            size = (width * trained[0] // 1024, height * trained[0] // 1024)
            fits = limits.allows_size(*size)
        else:
            shape = _shape(name)
            size = limits.size_for_aspect_ratio(*shape)
            fits = abs(math.log(size[0] / size[1] * shape[1] / shape[0])) < _SAME_SHAPE
        if fits:
            sizes[name] = size
    return sizes


def _shape(name: str) -> tuple[int, int]:
    width, _, height = name.partition(":")
    return int(width), int(height)
