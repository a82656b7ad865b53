"""Encodes losslessly to PNG, and decodes or refuses any file that a client sends as an image."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pybase64
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running_server import image_file, read_image

from engines.types import Pixels, RawImage, StageSeconds
from server.errors import InvalidError
from server.generation.image_codec import MAX_IMAGE_BYTES, ImageFormat, decode, encode, encoder


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 130), st.integers(1, 40), st.integers(0, 5))
def test_png_keeps_every_pixel_at_any_size(width: int, height: int, seed: int) -> None:
    smooth = np.add.outer(np.arange(height) * seed, np.arange(width))[:, :, None].repeat(3, axis=2).astype(np.uint8)
    for pixels in (noise(height, width, seed), smooth, np.zeros((height, width, 3), dtype=np.uint8)):
        np.testing.assert_array_equal(read_image(encode(pixels, "png", 90)), pixels)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_same_pixels_same_bytes(image_format: ImageFormat) -> None:
    pixels = noise(33, 65)
    content = encode(pixels, image_format, 90)
    assert content == encode(pixels.copy(), image_format, 90)
    image = RawImage(pixels, StageSeconds(0, 0, 0), 1)
    assert encoder(image_format, 90, base64=False)(image) == content
    assert pybase64.b64decode(encoder(image_format, 90, base64=True)(image)) == content
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode) == (image_format.upper(), (65, 33), "RGB")


def test_decoding_takes_bytes_base64_wrapped_lines_and_data_uris() -> None:
    pixels = noise(20, 30)
    content = image_file(pixels)
    text = pybase64.b64encode(content).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for source in (content, text, wrapped, f"data:image/png;base64,{text}"):
        np.testing.assert_array_equal(decode("image", source, 0), pixels)


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_photographs_are_turned_upright(orientation: int, stored_as: Image.Transpose) -> None:
    upright = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(upright).transpose(stored_as).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode("image", file.getvalue(), 0), upright)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(image_format: str) -> None:
    pixels = noise(5, 9)
    content = image_file(pixels, image_format, exif=b"Exif\0\0no TIFF at all", lossless=True)
    np.testing.assert_array_equal(decode("image", content, 0), pixels)


@pytest.mark.parametrize("background", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_show_the_background(mode: str, background: int) -> None:
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
    image.paste((200, 200, 200, 255), (0, 0, 4, 8))
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG")
    pixels = decode("image", file.getvalue(), background)
    assert (pixels[:, :4] == 200).all()
    assert (pixels[:, 4:] == background).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    np.testing.assert_array_equal(decode("image", file.getvalue(), 0)[:, :, 1], (gray >> 8).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(file, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    assert (decode("image", file.getvalue(), 0) == 255).all()


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for image_format in ("PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, image_format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode("image", file.getvalue(), 0)[4, 4].tolist() == [255, 0, 0]


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (image_file(np.zeros((1, 2049, 3), dtype=np.uint8)), "2049x1, allowed: at most 2048x2048"),
        (png_claiming(2048, 40_000), "2048x40000, allowed: at most 2048x2048"),
        (png_claiming(10_000, 10_000), "2048x2048"),
        (png_claiming(60_000, 60_000), "2048x2048"),
        (png_claiming(64, 64), "cannot be read"),
        (b"\0" * (MAX_IMAGE_BYTES + 1), "8 MiB"),
        ("A" * (MAX_IMAGE_BYTES * 4 // 3 + 8), "8 MiB"),
        (b"", "0 bytes that cannot be read"),
        (image_file(noise(9, 9), "GIF"), "png, jpeg or webp"),
        (image_file(noise(9, 9), "BMP"), "png, jpeg or webp"),
        (image_file(noise(64, 64), "JPEG")[:500], "cannot be read"),
        (image_file(noise(64, 64), "WEBP")[:500], "cannot be read"),
        ("not base64", "not base64"),
        ("Zm9v=Zm9v", "not base64"),
        ("é", "not base64"),
    ],
)
def test_what_is_no_acceptable_image_is_refused(source: Any, words: str) -> None:
    with pytest.raises(InvalidError, match=words) as caught:
        decode("control_image", source, 0)
    assert caught.value.field_errors[0].field == "control_image"


FILES = [image_file(noise(24, 24), image_format) for image_format in ("PNG", "JPEG", "WEBP")]


@settings(max_examples=300)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_read_or_refused(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode("image", bytes(damaged), 0)
    except InvalidError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert max(pixels.shape[:2]) <= 2048


def test_a_file_that_the_engine_made_is_taken() -> None:
    image = RawImage(np.empty((0, 0, 3), np.uint8), StageSeconds(0, 0, 0), 1, file=b"a file")
    assert encoder("jpeg", 90, base64=False)(image) == b"a file"
    assert encoder("jpeg", 90, base64=True)(image) == pybase64.b64encode(b"a file")
