"""Seeded malformed and odd image files, each with the response that it must get."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

Expected = Literal["read", "refused", "either"]  # 200, 422, or either
Maker = Callable[[random.Random], bytes]

FORMATS = ("PNG", "JPEG", "WEBP")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDE = 2048  # the largest that the server reads


def noise_image(rng: random.Random, mode: str = "RGB") -> Image.Image:
    """Returns noise of a random size."""
    size = rng.randrange(1, 80), rng.randrange(1, 80)
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * channels), dtype=np.uint8)
    return Image.frombytes(mode, size, noise.tobytes()) if mode != "1" else Image.new("1", size, rng.randrange(2))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def any_file(rng: random.Random) -> bytes:
    return encode(noise_image(rng), rng.choice(FORMATS))


def truncated(rng: random.Random) -> bytes:
    content = any_file(rng)
    return content[: rng.randrange(len(content))]


def flipped(rng: random.Random) -> bytes:
    content = bytearray(any_file(rng))
    for _ in range(rng.randrange(1, 20)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def spliced(rng: random.Random) -> bytes:
    first, second = any_file(rng), any_file(rng)
    return first[: rng.randrange(len(first))] + second[rng.randrange(len(second)) :]


def noise(rng: random.Random) -> bytes:
    head = rng.choice((b"", SIGNATURE, b"\xff\xd8\xff\xe0", b"RIFF\x20\x00\x00\x00WEBPVP8 ", b"GIF89a", b"\x00"))
    return head + rng.randbytes(rng.randrange(300))


def other_format(rng: random.Random) -> bytes:
    return encode(noise_image(rng), rng.choice(("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX")))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return SIGNATURE + head + extra + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def announced_bomb(rng: random.Random) -> bytes:
    """Announces a huge size."""
    side = rng.choice((SIDE + 1, 20_000, 60_000, 2**31 - 1))
    return png(side, rng.choice((1, side)), b"\0" * 100)


def inflating_bomb(rng: random.Random) -> bytes:
    """Announces a small size and inflates to many MiB: in its pixels, or in a text chunk."""
    many = b"\0" * (rng.randrange(1, 24) * 2**20)
    if rng.random() < 0.5:
        return png(8, 8, many)
    return png(8, 8, (b"\0" + b"\7" * 24) * 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(many, 9)))


def largest(rng: random.Random) -> bytes:
    """Has the largest allowed size in a few bytes."""
    return png(SIDE, SIDE, (b"\0" + bytes([rng.randrange(256)]) * SIDE) * SIDE, colour=0)


def sixteen_bit(rng: random.Random) -> bytes:
    colour, channels = rng.choice(((0, 1), (2, 3), (4, 2), (6, 4)))
    width, height = rng.randrange(1, 40), rng.randrange(1, 40)
    rows = b"".join(b"\0" + rng.randbytes(width * channels * 2) for _ in range(height))
    return png(width, height, rows, depth=16, colour=colour)


def few_bits(rng: random.Random) -> bytes:
    return encode(noise_image(rng, rng.choice(("1", "L", "LA", "RGBA"))), "PNG")


def palette(rng: random.Random) -> bytes:
    image = noise_image(rng).quantize(rng.randrange(2, 256))
    return encode(image, "PNG", transparency=0) if rng.random() < 0.5 else encode(image, "PNG")


def animated(rng: random.Random) -> bytes:
    frames = [Image.new("RGB", (16, 16), tuple(rng.randbytes(3))) for _ in range(rng.randrange(2, 6))]
    return encode(frames[0], rng.choice(("PNG", "WEBP")), save_all=True, append_images=frames[1:], duration=40)


def cmyk(rng: random.Random) -> bytes:
    return encode(noise_image(rng, "CMYK"), "JPEG")


def exif(rng: random.Random) -> bytes:
    """Has an odd orientation and description."""
    tags = Image.Exif()
    tags[0x0112] = rng.randrange(10)
    tags[0x010E] = "x" * rng.randrange(2000)
    blob = tags.tobytes()
    return encode(noise_image(rng), rng.choice(FORMATS), exif=blob)


def broken_exif(rng: random.Random) -> bytes:
    blob = b"Exif\0\0" + rng.choice((b"MM\0*", b"II*\0", b"")) + rng.randbytes(rng.randrange(60))
    return encode(noise_image(rng), rng.choice(FORMATS), exif=blob)


def broken_profile(rng: random.Random) -> bytes:
    return encode(noise_image(rng), rng.choice(FORMATS), icc_profile=rng.randbytes(rng.randrange(1, 400)))


def no_pixels(rng: random.Random) -> bytes:
    return rng.choice((b"", png(0, 5, b""), png(5, 0, b""), png(0, 0, b""), SIGNATURE, b"\xff\xd8\xff\xd9"))


def polyglot(rng: random.Random) -> bytes:
    """Is a valid image followed by a zip's end, a page, a script, or a PDF head."""
    tail = rng.choice(
        (b"PK\x05\x06" + b"\0" * 18, b"<html><script>alert(1)</script>", b"#!/bin/sh\nid\n", b"%PDF-1.7\n")
    )
    return any_file(rng) + tail * rng.randrange(1, 4)


def disguised(rng: random.Random) -> bytes:
    """Has another format's head in front of an image."""
    head = rng.choice(
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n", b"PK\x03\x04")
    )
    return head + any_file(rng)


KINDS: dict[str, tuple[Maker, Expected]] = {
    "whole": (any_file, "read"),
    "truncated": (truncated, "either"),
    "bits flipped": (flipped, "either"),
    "two spliced": (spliced, "either"),
    "noise": (noise, "refused"),
    "another format": (other_format, "refused"),
    "bomb, announced": (announced_bomb, "refused"),
    "bomb, inflating": (inflating_bomb, "either"),
    "largest": (largest, "read"),
    "16 bits": (sixteen_bit, "read"),
    "1 bit, gray, alpha": (few_bits, "read"),
    "palette": (palette, "read"),
    "animated": (animated, "read"),
    "CMYK": (cmyk, "read"),
    "EXIF": (exif, "read"),
    "EXIF, broken": (broken_exif, "read"),
    "colour profile, broken": (broken_profile, "read"),
    "no pixels": (no_pixels, "refused"),
    "polyglot": (polyglot, "read"),
    "disguised": (disguised, "refused"),
}
RARE = frozenset({"largest", "bomb, inflating"})  # 4 Mpixel and many MiB each: one of fifty


def bad_image(rng: random.Random) -> tuple[str, bytes, Expected]:
    """Returns the kind, the file and the expected response."""
    rare = rng.random() < 0.02
    kind = rng.choice([kind for kind in KINDS if (kind in RARE) == rare])
    make, expected = KINDS[kind]
    return kind, make(rng), expected
