"""File layouts and formats of prompt sets, as the public evaluators read them.

mjhq: <key>.jpg at quality 75, as saved by NVlabs' scripts/inference_sana_sprint.py. geneval: <index>/samples/<n>.png
beside <index>/metadata.jsonl (djghosh13/geneval, evaluate_images.py). dpg: <id>.png, four images in a square (ELLA's
compute_dpg_bench.py splits them). text and tiny: <index>.png.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.harness.errors import BenchError
from bench.quality.images.prompt_sets import Kind, PromptSet
from engines.types import MAX_SEED, Pixels

JPEG_QUALITY = 75  # Pillow's own, which torchvision's save_image leaves as it is
SAMPLES: dict[Kind, int] = {"mjhq": 1, "geneval": 4, "dpg": 4, "text": 1, "tiny": 1}


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file to make: a prompt and the seeds of its images; several form a square."""

    name: str  # below the folder of images
    prompt: str
    seeds: tuple[int, ...]
    tag: str | None = None


def image_files(prompts: PromptSet, samples: int | None = None, seed: int = 0) -> list[ImageFile]:
    """Returns every file of the set. Image j of prompt i has the seed `seed` + i * samples + j.

    samples: images per prompt, None: the evaluator's number. Raises BenchError for numbers that the layout cannot hold.
    """
    count = SAMPLES[prompts.kind] if samples is None else samples
    if count < 1 or (prompts.kind == "dpg" and math.isqrt(count) ** 2 != count):
        raise BenchError(f"samples: got {count}, allowed is 1 at least, and for dpg a square such as 1 or 4")
    if not 0 <= seed <= MAX_SEED - count * len(prompts.entries):
        raise BenchError(f"seed: got {seed}, allowed is 0 to {MAX_SEED - count * len(prompts.entries)}")
    files = []
    for index, entry in enumerate(prompts.entries):
        seeds = tuple(range(seed + index * count, seed + (index + 1) * count))
        if prompts.kind == "dpg":
            files.append(ImageFile(f"{entry.key}.png", entry.prompt, seeds, entry.tag))
            continue
        for j, image_seed in enumerate(seeds):
            files.append(ImageFile(_name(prompts.kind, entry.key, j, count), entry.prompt, (image_seed,), entry.tag))
    return files


def _name(kind: Kind, key: str, sample: int, count: int) -> str:
    if kind == "geneval":
        return f"{key}/samples/{sample:05}.png"
    ending = "jpg" if kind == "mjhq" else "png"
    return f"{key}.{ending}" if count == 1 else f"{key}-{sample}.{ending}"


def write_side_files(prompts: PromptSet, folder: Path) -> None:
    """Writes GenEval's metadata.jsonl for each prompt; nothing for other kinds."""
    for entry in prompts.entries if prompts.kind == "geneval" else ():
        prompt_folder = folder / entry.key
        (prompt_folder / "samples").mkdir(parents=True, exist_ok=True)
        (prompt_folder / "metadata.jsonl").write_text(json.dumps(entry.metadata), encoding="utf-8")


def encoded(images: Sequence[Pixels], name: str) -> bytes:
    """Encodes the file `name` from one image, or from a square of them in row order."""
    side = math.isqrt(len(images))
    rows = [np.concatenate(images[row * side : (row + 1) * side], axis=1) for row in range(side)]
    file = io.BytesIO()
    sheet = Image.fromarray(np.concatenate(rows))
    if name.endswith(".jpg"):
        sheet.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        sheet.save(file, "PNG", compress_level=1)
    return file.getvalue()


def decoded(content: bytes) -> Pixels:
    """Returns an image file's pixels: uint8 RGB [H, W, 3]."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def chunks(files: Sequence[ImageFile], images: int) -> Iterator[list[ImageFile]]:
    """Yields the files in order, in groups of at most `images` images and at least one file."""
    group: list[ImageFile] = []
    for file in files:
        if group and sum(len(item.seeds) for item in group) + len(file.seeds) > images:
            yield group
            group = []
        group.append(file)
    if group:
        yield group
