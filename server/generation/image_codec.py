"""Pixels to PNG, JPEG or WebP and back, on a few threads of their own: never the engine's, never the event loop's.

PNG is written by fpng (lossless; 1024x1024 in about a hundredth of the time of zlib at its default level, for which it
holds the interpreter lock), JPEG and WebP by Pillow. All are deterministic: the same pixels give the same bytes. On a
GPU the engine makes PNG and JPEG files itself.
"""

import asyncio
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeVar, get_args

import fpng
import numpy as np
import pybase64
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from engines.types import Pixels, RawImage
from server.errors import FieldError, InvalidError
from server.generation.formats import name_of

T = TypeVar("T")

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_IMAGE_BYTES = 8 * 2**20
MAX_IMAGE_SIDE = 2048
MAX_COEFFICIENTS = 48 * 2**20  # bytes; decoding a PNG of 2048x2048 with transparency takes more
READABLE = ("PNG", "JPEG", "WEBP")
URL_SAFE = str.maketrans("-_", "+/")  # some clients write base64 for URLs, and leave the padding out
WEBP_EFFORT = 0  # of 6: 24 ms instead of 80 ms for 1024x1024, files a tenth larger


class Codec:
    """The threads, and what runs on them."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="codec")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Runs `work` on a codec thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def begin(self, work: Callable[..., None], *arguments: object) -> None:
        """Has `work`, which must not raise, run on a codec thread; may be called on any thread, and does not wait."""
        self._pool.submit(work, *arguments)

    async def decode(self, field: str, source: bytes | str, background: int) -> Pixels:
        """See `decode`."""
        return await self.run(decode, field, source, background)

    async def warm(self) -> None:
        """Loads the plugins, so that no request pays for it."""
        for image_format in get_args(ImageFormat):
            pixels = np.zeros((1, 1, 3), dtype=np.uint8)
            await self.decode("image", await self.run(encode, pixels, image_format, 90), 0)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def encoder(image_format: ImageFormat, quality: int, *, base64: bool) -> Callable[[RawImage], bytes]:
    """What makes the image file, or its base64, of an engine's image."""
    return partial(encode_image, image_format=image_format, quality=quality, base64=base64)


def encode_image(image: RawImage, image_format: ImageFormat, quality: int, *, base64: bool) -> bytes:
    """The file, or its base64; one that the engine made already is taken."""
    file = encode(image.pixels, image_format, quality) if image.file is None else image.file
    return pybase64.b64encode(file) if base64 else file


def encode(pixels: Pixels, image_format: ImageFormat, quality: int) -> bytes:
    """The image file of [height, width, 3] uint8 RGB. `quality` (1 to 100) is for jpeg and webp."""
    height, width, _ = pixels.shape
    if image_format == "png":
        content: bytes = fpng.from_bytes(pixels.tobytes(), width, height, 3)
        return content
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "jpeg":
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "WEBP", quality=quality, method=WEBP_EFFORT)
    return file.getvalue()


def decode(field: str, source: bytes | str, background: int) -> Pixels:
    """[height, width, 3] uint8 RGB of a PNG, JPEG or WebP file, given as bytes or as base64 (a data: URI is fine).

    The first frame of an animation; turned upright as EXIF says, where it can be read; 16 bits are cut to 8;
    transparent parts show `background` (a gray level); colour profiles are ignored. A JPEG of more than 2048x2048 is
    decoded at a half, a quarter or an eighth, where that fits. Raises InvalidError (422) that names `field`. Nothing is
    decompressed before the size is known to be at most 2048x2048.
    """
    with _opened(field, _content(field, source)) as image:
        return _upright_rgb(image, background)


def measured(field: str, source: bytes | str) -> tuple[bytes, tuple[int, int]]:
    """The file, and the (width, height) of its picture once it is upright. Raises as `decode`."""
    content = _content(field, source)
    with _opened(field, content) as image:
        width, height = image.size
        turned = _orientation(image) >= 5  # EXIF: 5 to 8 lie on their side
        return content, (height, width) if turned else (width, height)


def _content(field: str, source: bytes | str) -> bytes:
    content = _from_base64(field, source) if isinstance(source, str) else source
    if len(content) > MAX_IMAGE_BYTES:
        raise _refused(field, f"{len(content)} bytes", f"at most {MAX_IMAGE_BYTES} bytes (8 MiB)")
    return content


@contextmanager
def _opened(field: str, content: bytes) -> Iterator[Image.Image]:
    """The image, of at most MAX_IMAGE_SIDE a side once it is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=READABLE) as image:
            width, height = image.size
            _shrink(image)
            if max(image.size) <= MAX_IMAGE_SIDE:
                yield image
                return
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(field, "an image of too many pixels", _size_allowed()) from error
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them raise
        name = name_of(content)
        got = f"{len(content)} bytes that cannot be read as an image"
        if name is not None:
            got = f"a {name} file of {len(content)} bytes, which cannot be read here"
        raise _refused(field, got, "png, jpeg or webp") from error
    raise _refused(field, f"an image of {width}x{height}", _size_allowed())


def _shrink(image: Image.Image) -> None:
    """Has a JPEG that is too large decoded at a fraction (in its own transform, never whole), where memory allows."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or max(image.size) <= MAX_IMAGE_SIDE:
        return
    if "progressive" in image.info and _coefficient_bytes(image) > MAX_COEFFICIENTS:
        return
    width, height = image.size
    for scale in (2, 4, 8):
        if -(-max(width, height) // scale) <= MAX_IMAGE_SIDE:
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
            return


def _coefficient_bytes(image: JpegImagePlugin.JpegImageFile) -> int:
    """What libjpeg holds of a progressive file until its last scan: 2 bytes each, of every component."""
    sampling = [(across, down) for _, across, down, _ in image.layer]
    most = max(across for across, _ in sampling) * max(down for _, down in sampling)
    return 2 * image.size[0] * image.size[1] * sum(across * down for across, down in sampling) // most


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in _upright
        return 1


def _upright_rgb(image: Image.Image, background: int) -> Pixels:
    upright = _upright(image)
    if upright.mode.startswith("I"):  # 16-bit gray: Pillow would clip where it should scale
        gray = (np.asarray(upright, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(gray[:, :, None], (*gray.shape, 3)))
    if "A" in upright.getbands() or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (background, background, background, 255))
        upright = Image.alpha_composite(ground, layer)
    return np.array(upright.convert("RGB"), dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises whatever broken EXIF makes it raise; broken pixels raise again when they are read
        return image


def _from_base64(field: str, text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())
    if len(text) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise _refused(field, f"{len(text)} characters of base64", f"at most {MAX_IMAGE_BYTES} bytes (8 MiB)")
    text = text.translate(URL_SAFE).rstrip("=")
    try:
        return pybase64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise _refused(field, f"{len(text)} characters that are not base64", "base64 of a png, jpeg or webp") from error


def _size_allowed() -> str:
    return f"at most {MAX_IMAGE_SIDE}x{MAX_IMAGE_SIDE}, or a jpeg that is so at an eighth"


def _refused(field: str, got: str, allowed: str) -> InvalidError:
    return InvalidError([FieldError(field, f"{field}: got {got}, allowed: {allowed}")])
