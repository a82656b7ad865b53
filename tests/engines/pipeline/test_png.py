"""PNG by tensor operations: lossless for any image, and smaller than fpng for photographs."""

import io
import zlib

import fpng
import numpy as np
import pytest
import torch
from PIL import Image

from engines.pipeline.png import PngEncoder, average_filtered, is_black, png_file
from engines.types import Pixels


@pytest.fixture(scope="module")
def encoder() -> PngEncoder:
    return PngEncoder(torch.device("cpu"))


def made(encoder: PngEncoder, pixels: Pixels) -> tuple[bytes, tuple[int, int, int]]:
    words, facts = encoder({"pixels": torch.tensor(pixels)[None]})
    bits, low, high = facts[0].tolist()
    return png_file(words.numpy().view(np.uint8)[0].data, (bits, low, high), *pixels.shape[:2]), (bits, low, high)


def photograph(side: int) -> Pixels:
    """Returns shapes of all sizes with some grain, like a photograph."""
    rng = np.random.default_rng(5)
    image = rng.normal(0, 2, (side, side, 3))
    for cells in (3, 6, 12, 24, 48):
        coarse = [Image.fromarray(rng.normal(0, 100 / cells**0.8, (cells, cells)).astype("f4")) for _ in range(3)]
        image += np.stack([np.asarray(one.resize((side, side), Image.Resampling.BICUBIC)) for one in coarse], axis=2)
    return (image + 128).clip(0, 255).astype(np.uint8)


IMAGES = {
    "photograph": photograph(128),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8),
    "white": np.full((32, 64, 3), 255, np.uint8),
    "one pixel": np.array([[[1, 255, 128]]], np.uint8),
    "odd sides": np.random.default_rng(1).integers(0, 40, (31, 33, 3), dtype=np.uint8),
    "stripes": np.tile(np.array([[[0] * 3, [255] * 3]], np.uint8), (40, 20, 1)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_comes_back_whole(encoder: PngEncoder, name: str) -> None:
    """Pillow checks the sums of every chunk, zlib the Adler-32."""
    pixels = IMAGES[name]
    content, facts = made(encoder, pixels)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert zlib.decompress(content[41:-16]) == average_filtered(torch.tensor(pixels)).numpy().tobytes()
    assert not is_black(facts, pixels.shape[0])
    assert made(encoder, pixels)[0] == content


def test_sizes(encoder: PngEncoder) -> None:
    """Compares a photograph with fpng, and noise with the size of its pixels."""
    photo, noise = IMAGES["photograph"], IMAGES["noise"]
    assert len(made(encoder, photo)[0]) < 0.9 * len(fpng.from_bytes(photo.tobytes(), photo.shape[1], photo.shape[0], 3))
    assert len(made(encoder, noise)[0]) < 1.02 * noise.nbytes


def test_black_is_seen(encoder: PngEncoder) -> None:
    black = np.zeros((16, 8, 3), np.uint8)
    _, facts = made(encoder, black)
    assert is_black(facts, 16)
    black[15, 7, 2] = 1
    assert not is_black(made(encoder, black)[1], 16)
