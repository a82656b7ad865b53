"""What built engines do to whole images: the same prompts and seeds through them and through fp32, image by image.

The gates of a build compare modules on given inputs; this is text to pixels, at every number of steps that was built
for. It judges no content: distill and bench do.
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

EQUAL_DB = 99.0  # stands for images that are equal, whose PSNR is infinite
Z95 = 1.96


@dataclass(frozen=True, slots=True)
class PairedCheck:
    """PSNR in dB of `images` pairs: mean with the bounds of its 95 % interval (normal, over prompts), and the worst."""

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
    """Steps -> the check, of `images` calibration prompts at the built engine's default size.

    Raises BuildError for less than two images.
    """
    if images < 2:
        raise BuildError(f"quality: got {images} image(s), an interval needs two at least")
    return {str(count): _of_steps(reference, built, count, images) for count in steps}


def _of_steps(reference: Engine, built: Engine, steps: int, images: int) -> PairedCheck:
    width, height = built.limits.default_size
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(images)]
    jobs = [Job(prompt, seed, width, height, steps) for seed, prompt in enumerate(prompts)]
    pairs = zip(_made(reference, jobs), _made(built, jobs), strict=True)
    found = [_psnr(one, other) for one, other in pairs]
    mean = statistics.fmean(found)
    wide = Z95 * statistics.stdev(found) / math.sqrt(images)
    worst = min(range(images), key=found.__getitem__)
    low, high = round(mean - wide, 2), round(mean + wide, 2)
    return PairedCheck(images, steps, round(mean, 2), low, high, round(found[worst], 2), prompts[worst])


def _made(engine: Engine, jobs: Sequence[Job]) -> list[Pixels]:
    largest = engine.limits.max_batch
    groups = (jobs[first : first + largest] for first in range(0, len(jobs), largest))
    return [image.pixels for group in groups for image in engine.generate(group)]


def _psnr(one: Pixels, other: Pixels) -> float:
    found = difference(torch.from_numpy(one), torch.from_numpy(other)).psnr_db
    return EQUAL_DB if found is None else min(EQUAL_DB, found)


def with_check(folder: Path, manifest: Manifest, checks: Mapping[str, PairedCheck]) -> Manifest:
    """Writes the checks into the manifest of `folder`, and returns it."""
    told = replace(manifest, quality={steps: check.to_dict() for steps, check in checks.items()})
    with TemporaryDirectory(dir=folder) as part:
        told.write(Path(part))
        (Path(part) / MANIFEST_FILE).replace(folder / MANIFEST_FILE)  # at once: a server may be reading it
    return told
