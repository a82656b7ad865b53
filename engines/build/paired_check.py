"""Compares images of built engines with images of fp32 of the same prompts and seeds.

The gates of a build compare single modules. This check runs from text to pixels, at every number of steps of the build.
It judges no content; distill and bench do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engines.artifacts.manifest import MANIFEST_FILE, Manifest
from engines.backends.parity import difference
from engines.errors import BuildError
from engines.pipeline.calibration import PROMPTS
from engines.types import Engine, Job, Pixels

EQUAL_DB = 99.0  # for equal images, whose PSNR is infinite
Z95 = 1.96


@dataclass(frozen=True, slots=True)
class PairedCheck:
    """PSNR in dB of `images` pairs: mean, bounds of its 95 % interval (normal, over prompts), and the worst."""

    images: int
    steps: int
    psnr_db: float
    low_db: float
    high_db: float
    worst_db: float
    worst_prompt: str

    def to_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


def paired_check(reference: Engine, built: Engine, steps: Sequence[int], images: int = 16) -> Mapping[str, PairedCheck]:
    """Returns steps -> check of `images` calibration prompts at the built engine's default size.

    Raises BuildError for less than two images.
    """
    if images < 2:
        raise BuildError(f"quality: got {images} image(s), an interval needs two at least")
    return {str(count): _check_steps(reference, built, count, images) for count in steps}


def _check_steps(reference: Engine, built: Engine, steps: int, images: int) -> PairedCheck:
    width, height = built.limits.default_size
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(images)]
    jobs = [Job(prompt, seed, width, height, steps) for seed, prompt in enumerate(prompts)]
    psnr = [_psnr(*pair) for pair in zip(_images(reference, jobs), _images(built, jobs), strict=True)]
    mean = statistics.fmean(psnr)
    half = Z95 * statistics.stdev(psnr) / math.sqrt(images)
    worst = min(range(images), key=psnr.__getitem__)
    low, high = round(mean - half, 2), round(mean + half, 2)
    return PairedCheck(images, steps, round(mean, 2), low, high, round(psnr[worst], 2), prompts[worst])


def _images(engine: Engine, jobs: Sequence[Job]) -> list[Pixels]:
    largest = engine.limits.max_batch
    batches = (jobs[first : first + largest] for first in range(0, len(jobs), largest))
    return [image.pixels for batch in batches for image in engine.generate(batch)]


def _psnr(reference: Pixels, image: Pixels) -> float:
    psnr = difference(torch.from_numpy(reference), torch.from_numpy(image)).psnr_db
    return EQUAL_DB if psnr is None else min(EQUAL_DB, psnr)


def with_check(folder: Path, manifest: Manifest, checks: Mapping[str, PairedCheck]) -> Manifest:
    """Writes the checks into the manifest of `folder`, and returns it."""
    checked = replace(manifest, quality={steps: check.to_dict() for steps, check in checks.items()})
    with TemporaryDirectory(dir=folder) as temporary:
        checked.write(Path(temporary))
        (Path(temporary) / MANIFEST_FILE).replace(folder / MANIFEST_FILE)  # atomic: a server may be reading it
    return checked
