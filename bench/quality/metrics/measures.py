"""Computes each metric from images with a given network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bench.harness.errors import BenchError
from bench.quality.intervals import mean_interval
from bench.quality.metrics.clip import ImageText
from bench.quality.metrics.distances import Features, Moments, frechet_distance, mean_discrepancy
from bench.quality.metrics.image_items import ImageItem, batches, center_crop, read_images, with_prompts
from distill.evaluation.intervals import Interval
from distill.world.captions import parse_caption
from distill.world.judge import judge

Network = Callable[[Tensor], Tensor]  # [B, 3, H, W] -> features [B, D]
BATCH = 50  # upstream's


def fid(items: Sequence[ImageItem], reference: Path, network: Network, size: int, keep: Path | None = None) -> float:
    """Returns the Fréchet distance between the images and `reference`, a folder or pytorch-fid's .npz.

    size: both sets are cropped to it, upstream's --img_size. keep: writes the reference's statistics there for reuse.
    """
    if reference.suffix == ".npz":
        reference_moments = Moments.read(reference)
    else:
        reference_moments = Moments.of(_features(read_images(reference), network, size))
    if keep is not None:
        reference_moments.write(keep)
    result = Moments.of(_features(items, network, size))
    if result.mean.shape != reference_moments.mean.shape:
        raise BenchError(
            f"fid: {reference} has {len(reference_moments.mean)} features, the network gives {len(result.mean)}"
        )
    return frechet_distance(result, reference_moments)


def _features(items: Sequence[ImageItem], network: Network, size: int) -> Features:
    paths = [item.path for item in items]
    return np.concatenate([network(batch).double().numpy() for batch in batches(paths, center_crop(size), BATCH)])


def clip_score(items: Sequence[ImageItem], network: ImageText) -> Interval:
    """Returns the mean of logit scale times cosine of image and prompt, with its interval.

    Source: NVlabs' tools/metrics/clip-score/clip_score.py.
    """
    scale = network.logit_scale
    return mean_interval([scale * value for value in _cosines(items, network, "clip")])


def hps(items: Sequence[ImageItem], network: ImageText) -> Interval:
    """Returns 100 times the cosine of image and prompt in HPSv2's space (tgxs002/HPSv2, hpsv2/img_score.py)."""
    return mean_interval([100 * value for value in _cosines(items, network, "hps")])


def _cosines(items: Sequence[ImageItem], network: ImageText, metric: str) -> list[float]:
    pairs = with_prompts(items, metric)
    result: list[float] = []
    for batch in batches([path for path, _ in pairs], network.prepare, BATCH):
        texts = [prompt for _, prompt in pairs[len(result) : len(result) + len(batch)]]
        result += (network.images(batch) * network.texts(texts)).sum(1).tolist()
    return result


def cmmd(items: Sequence[ImageItem], reference: Path, network: ImageText) -> float:
    """Returns the maximum mean discrepancy between CLIP embeddings of the images and of the folder `reference`."""
    sets = (items, read_images(reference))
    first, second = (
        np.concatenate(
            [
                network.images(b).double().numpy()
                for b in batches([item.path for item in source], network.prepare, BATCH)
            ]
        )
        for source in sets
    )
    return mean_discrepancy(first, second)


def judge_score(items: Sequence[ImageItem]) -> dict[str, Any]:
    """Returns the tiny world's judge: share of correct images by category, and its mean as GenEval's."""
    correct: dict[str, list[float]] = {}
    for path, prompt in with_prompts(items, "judge"):
        with Image.open(path) as image:
            verdict = judge(np.asarray(image.convert("RGB")), parse_caption(prompt))
        tag = next((first.tag for first in items if first.path == path), None) or "all"
        correct.setdefault(tag, []).append(float(verdict.correct))
    categories = {name: round(fmean(values), 4) for name, values in sorted(correct.items())}
    return {"value": round(fmean(categories.values()), 4), "categories": categories}
