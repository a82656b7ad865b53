"""What the judge sees with: connected regions of a mask, and how much a region resembles each drawable shape."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.world.rendering import coverage

Mask = NDArray[np.bool_]  # [H,W]
Cover = NDArray[np.float32]  # [H,W], share of each pixel that is covered, 0 to 1

GRID = 32  # samples along each side of the canonical frame
FRAME = 2.2  # side of that frame, over the square root of the region's area
ANGLES = tuple(range(-15, 16, 3))  # degrees; beyond them a square is a diamond and a triangle lies down
BLURS = (0.0, 0.04, 0.08, 0.12)  # standard deviation over the size: a small decoder rounds corners and softens edges
EDGE_GAIN = 2.0  # a soft edge counts by its half-way line; noise below a quarter of the contrast does not count


class Match(NamedTuple):
    """The best shape, its intersection over union, and by how much that beats every other shape's.

    `size` is as in Thing, in pixels.
    """

    shape: str
    overlap: float
    lead: float
    size: float


def regions(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """4-connected regions: labels [H,W] (0 outside, then 1 to n) and n. Runs of each row joined by union-find."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = (axis.tolist() for axis in np.nonzero(edges == 1))
    ends: list[int] = np.nonzero(edges == -1)[1].tolist()
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0  # the first run that may still touch this one from the row above
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run]):
            above += 1
        other = above
        while other < run and rows[other] == row - 1 and starts[other] < ends[run]:
            parent[root(run)] = root(other)
            other += 1
    roots, ids = np.unique([root(run) for run in range(len(rows))], return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(ids.astype(np.int32) + 1, np.array(ends, np.intp) - np.array(starts, np.intp))
    return labels, len(roots)


def core(mask: Mask, share: float) -> Mask:
    """The innermost part of a region: its outline is taken off until at most `share` of its area is left."""
    most = share * mask.sum()
    while mask.sum() > most:
        padded = np.pad(mask, 1)
        inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        if not inner.any():
            break
        mask = inner
    return mask


def hardened(share: NDArray[np.floating[Any]]) -> Cover:
    """Soft shares of coverage made steeper around one half."""
    cover: Cover = np.clip(EDGE_GAIN * (share - 0.5) + 0.5, 0, 1).astype(np.float32)
    return cover


def canonical(cover: Cover) -> Cover:
    """A region moved to its centroid and scaled to area 1, sampled bilinearly: [GRID*GRID]."""
    area = float(cover.sum())
    height, width = cover.shape
    centre_x = float(cover.sum(0) @ np.arange(width)) / area
    centre_y = float(cover.sum(1) @ np.arange(height)) / area
    steps = (np.arange(GRID) + 0.5) / GRID - 0.5
    padded = np.pad(cover, 1)

    def axis(centre: float, length: int) -> tuple[NDArray[np.intp], Cover]:
        places = np.clip(centre + 1 + steps * FRAME * area**0.5, 0, length + 1 - 1e-3)
        whole = np.floor(places).astype(np.intp)
        return whole, (places - whole).astype(np.float32)

    (x, dx), (y, dy) = axis(centre_x, width), axis(centre_y, height)
    rows = padded[y] * (1 - dy)[:, None] + padded[y + 1] * dy[:, None]
    sampled: Cover = (rows[:, x] * (1 - dx) + rows[:, x + 1] * dx).ravel().astype(np.float32)
    return sampled


def _blurred(cover: Cover, sigma: float) -> Cover:
    if not sigma:
        return cover
    reach = int(3 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    soft: NDArray[Any] = cover
    for axis in (0, 1):
        soft = np.apply_along_axis(np.convolve, axis, soft, kernel, "same")
    blurred: Cover = soft.astype(np.float32)
    return blurred


@lru_cache(maxsize=8)
def templates(shapes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[float, ...], Cover]:
    """Every shape at every angle and blur: names, areas at size 1, canonical coverages [N,GRID*GRID]."""
    pixels, size = 96, 48.0
    offsets = np.arange(pixels, dtype=np.float32) - np.float32(pixels / 2 - 0.5)
    names, areas, covers = [], [], []
    for shape in shapes:
        for angle in ANGLES if shape != "circle" else (0,):
            crisp = coverage(shape, offsets[None, :], offsets[:, None], size, float(angle))
            for blur in BLURS:
                names.append(shape)
                soft = hardened(_blurred(crisp, blur * size))
                areas.append(float(soft.sum()) / size**2)
                covers.append(canonical(soft))
    return tuple(names), tuple(areas), np.stack(covers)


def match(cover: Cover, shapes: tuple[str, ...]) -> Match:
    """The shape a region resembles most, whatever its place and size."""
    names, areas, covers = templates(shapes)
    seen = canonical(cover)
    shared = np.minimum(covers, seen).sum(1)
    overlaps = shared / (covers.sum(1) + seen.sum() - shared)
    best = int(overlaps.argmax())
    rivals = overlaps[np.array(names) != names[best]]
    lead = float(overlaps[best] - rivals.max()) if len(rivals) else 1.0
    return Match(names[best], float(overlaps[best]), lead, float(cover.sum() / areas[best]) ** 0.5)
