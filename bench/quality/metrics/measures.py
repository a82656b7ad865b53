"""Each metric from images to a figure, by the networks it is given."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bench.harness.errors import BenchError
from bench.quality.intervals import Interval, mean_interval
from bench.quality.metrics.clip import ImageText
from bench.quality.metrics.distances import Features, Moments, frechet_distance, mean_discrepancy
from bench.quality.metrics.shown import Shown, batches, cut_to, read_shown, with_prompts
from distill.world.captions import parse_caption
from distill.world.judge import judge

Network = Callable[[Tensor], Tensor]  # [B, 3, H, W] -> features [B, D]
BATCH = 50  # upstream's


def fid(shown: Sequence[Shown], reference: Path, network: Network, size: int, keep: Path | None = None) -> float:
    """Fréchet distance between the images and those of `reference`, a folder or an .npz of pytorch-fid.

    size: what both are cut to, upstream's --img_size. keep: where the statistics of the reference are written for the
    next time.
    """
    if reference.suffix == ".npz":
        known = Moments.read(reference)
    else:
        known = Moments.of(_features(read_shown(reference), network, size))
    if keep is not None:
        known.write(keep)
    found = Moments.of(_features(shown, network, size))
    if found.mean.shape != known.mean.shape:
        raise BenchError(f"fid: {reference} has {len(known.mean)} features, the network gives {len(found.mean)}")
    return frechet_distance(found, known)


def _features(shown: Sequence[Shown], network: Network, size: int) -> Features:
    paths = [one.path for one in shown]
    return np.concatenate([network(batch).double().numpy() for batch in batches(paths, cut_to(size), BATCH)])


def clip_score(shown: Sequence[Shown], network: ImageText) -> Interval:
    """Logit scale times cosine of image and prompt, its mean over images with an interval.

    Source: NVlabs' tools/metrics/clip-score/clip_score.py. HPSv2 is the same of its own network, times 100.
    """
    scale = network.logit_scale
    return mean_interval([scale * value for value in _cosines(shown, network, "clip")])


def hps(shown: Sequence[Shown], network: ImageText) -> Interval:
    """100 times the cosine of image and prompt in HPSv2's space (tgxs002/HPSv2, hpsv2/img_score.py)."""
    return mean_interval([100 * value for value in _cosines(shown, network, "hps")])


def _cosines(shown: Sequence[Shown], network: ImageText, metric: str) -> list[float]:
    pairs = with_prompts(shown, metric)
    found: list[float] = []
    for batch in batches([path for path, _ in pairs], network.prepare, BATCH):
        texts = [prompt for _, prompt in pairs[len(found) : len(found) + len(batch)]]
        found += (network.images(batch) * network.texts(texts)).sum(1).tolist()
    return found


def cmmd(shown: Sequence[Shown], reference: Path, network: ImageText) -> float:
    """Maximum mean discrepancy between CLIP embeddings of the images and of those in the folder `reference`."""
    sets = (shown, read_shown(reference))
    one, other = (
        np.concatenate(
            [network.images(b).double().numpy() for b in batches([i.path for i in s], network.prepare, BATCH)]
        )
        for s in sets
    )
    return mean_discrepancy(one, other)


def judged(shown: Sequence[Shown]) -> dict[str, Any]:
    """The tiny world's judge: share of right images by category, and the mean over categories as GenEval has it."""
    right: dict[str, list[float]] = {}
    for path, prompt in with_prompts(shown, "judge"):
        with Image.open(path) as image:
            verdict = judge(np.asarray(image.convert("RGB")), parse_caption(prompt))
        tag = next((one.tag for one in shown if one.path == path), None) or "all"
        right.setdefault(tag, []).append(float(verdict.correct))
    categories = {name: round(fmean(values), 4) for name, values in sorted(right.items())}
    return {"value": round(fmean(categories.values()), 4), "categories": categories}
