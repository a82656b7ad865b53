"""Draws a sheet of each variant's worst images beside the first variant's."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw

from engines.types import Pixels

TILE, GAP, LINE = 128, 8, 14  # pixels


@dataclass(frozen=True, slots=True)
class ImagePair:
    """A prompt's images by the first variant and by another."""

    variant: str
    prompt: str
    psnr_db: float | None
    first: Pixels
    other: Pixels


def write_sheet(pairs: Sequence[ImagePair], path: Path) -> None:
    """Writes a row for each variant, worst first: the first variant's image on the left."""
    rows = [list(group) for _, group in groupby(pairs, lambda pair: pair.variant)]
    wide = 2 * TILE + 2 * GAP
    width, height = wide * max(map(len, rows), default=1), (TILE + 3 * LINE) * len(rows)
    sheet = Image.new("RGB", (width, max(height, 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = index * (TILE + 3 * LINE)
        draw.text((GAP, top), row[0].variant, "black")
        for column, pair in enumerate(row):
            left = column * wide
            for side, pixels in enumerate((pair.first, pair.other)):
                image = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(image, (left + side * (TILE + 1), top + 2 * LINE))
            distance = "equal" if pair.psnr_db is None else f"{pair.psnr_db:.1f} dB"
            draw.text((left + GAP, top + LINE), f"{distance}: {pair.prompt}"[:44], "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
