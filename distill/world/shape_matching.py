"""Connected regions of a mask, and the similarity of a region to each drawable shape.

Functions import scipy, because programs that only parse captions run without it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.world.rendering import coverage

Mask = NDArray[np.bool_]  # [H,W]
Cover = NDArray[np.float32]  # [H,W], share of each pixel that is covered, 0 to 1

GRID = 32  # samples along each side of the normalised frame
FRAME = 2.2  # side of that frame, over the square root of the region's area
ANGLES = tuple(range(-15, 16, 3))  # degrees; a square tilted further is a diamond
BLURS = (0.0, 0.04, 0.08, 0.12)  # standard deviation over the size: a small decoder rounds corners and softens edges
EDGE_GAIN = 2.0  # drops noise below a quarter of the contrast, and keeps the half-way line of a soft edge


class Match(NamedTuple):
    """The most similar shape, its intersection over union, and the margin of that over every other shape's.

    `size` is Thing.size in pixels.
    """

    shape: str
    overlap: float
    margin: float
    size: float


def connected_components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Labels the 4-connected regions of a mask: [H,W], 0 outside and 1 to n inside, and n."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    return labels, count


def erode_to(mask: Mask, share: float) -> Mask:
    """Erodes a region until at most `share` of its area is left, but never to nothing."""
    from scipy import ndimage

    most = share * mask.sum()
    while mask.sum() > most:
        inner: Mask = ndimage.binary_erosion(mask)
        if not inner.any():
            break
        mask = inner
    return mask


def sharpen_edges(share: NDArray[np.floating[Any]]) -> Cover:
    """Makes soft shares of coverage steeper around one half."""
    cover: Cover = np.clip(EDGE_GAIN * (share - 0.5) + 0.5, 0, 1).astype(np.float32)
    return cover


def normalise_shape(cover: Cover) -> Cover:
    """Moves a region to its centroid, scales it to area 1 and samples it bilinearly: [GRID*GRID]."""
    area = float(cover.sum())
    height, width = cover.shape
    centre_x = float(cover.sum(0) @ np.arange(width)) / area
    centre_y = float(cover.sum(1) @ np.arange(height)) / area
    steps = (np.arange(GRID) + 0.5) / GRID - 0.5
    padded = np.pad(cover, 1)

    def axis(centre: float, length: int) -> tuple[NDArray[np.intp], Cover]:
        positions = np.clip(centre + 1 + steps * FRAME * area**0.5, 0, length + 1 - 1e-3)
        whole = np.floor(positions).astype(np.intp)
        return whole, (positions - whole).astype(np.float32)

    (x, dx), (y, dy) = axis(centre_x, width), axis(centre_y, height)
    rows = padded[y] * (1 - dy)[:, None] + padded[y + 1] * dy[:, None]
    sampled: Cover = (rows[:, x] * (1 - dx) + rows[:, x + 1] * dx).ravel().astype(np.float32)
    return sampled


@lru_cache(maxsize=8)
def templates(shapes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[float, ...], Cover]:
    """Returns every shape at every angle and blur: names, areas at size 1, normalised coverages [N,GRID*GRID]."""
    from scipy import ndimage

    pixels, size = 96, 48.0
    offsets = np.arange(pixels, dtype=np.float32) - np.float32(pixels / 2 - 0.5)
    names, areas, covers = [], [], []
    for shape in shapes:
        for angle in ANGLES if shape != "circle" else (0,):
            crisp = coverage(shape, offsets[None, :], offsets[:, None], size, float(angle))
            for blur in BLURS:
                names.append(shape)
                sigma, radius = blur * size, int(3 * blur * size) + 1
                blurred = ndimage.gaussian_filter(crisp.astype(float), sigma, mode="constant", radius=radius)
                soft = sharpen_edges(blurred if blur else crisp)
                areas.append(float(soft.sum()) / size**2)
                covers.append(normalise_shape(soft))
    return tuple(names), tuple(areas), np.stack(covers)


def match_shape(cover: Cover, shapes: tuple[str, ...]) -> Match:
    """Finds the shape most similar to a region of any position and size."""
    names, areas, covers = templates(shapes)
    seen = normalise_shape(cover)
    shared = np.minimum(covers, seen).sum(1)
    overlaps = shared / (covers.sum(1) + seen.sum() - shared)
    best = int(overlaps.argmax())
    rivals = overlaps[np.array(names) != names[best]]
    margin = float(overlaps[best] - rivals.max()) if len(rivals) else 1.0
    return Match(names[best], float(overlaps[best]), margin, float(cover.sum() / areas[best]) ** 0.5)
