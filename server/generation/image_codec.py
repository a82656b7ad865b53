"""Encodes pixels to PNG, JPEG or WebP and decodes them, on codec threads.

fpng writes PNG: lossless, in about a hundredth of zlib's time at its default level for 1024x1024. It holds the
interpreter lock meanwhile. Pillow writes JPEG and WebP. All are deterministic: the same pixels give the same bytes.
On a GPU the engine makes PNG and JPEG files itself.
"""

import asyncio
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import fpng
import numpy as np
import pybase64
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from engines.types import Pixels, RawImage
from server.errors import FieldError, InvalidError
from server.generation.formats import detect_format

T = TypeVar("T")

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_IMAGE_BYTES = 8 * 2**20
MAX_IMAGE_SIDE = 2048
MAX_COEFFICIENTS = 48 * 2**20  # bytes; decoding a PNG of 2048x2048 with transparency takes more
READABLE = ("PNG", "JPEG", "WEBP")
URL_SAFE = str.maketrans("-_", "+/")  # some clients write base64 for URLs, and leave the padding out
SHORT_PIXELS = 3 * 256 * 256  # numbers of an image that fpng writes in 0.2 ms
WEBP_EFFORT = 0  # of 6: 24 ms instead of 80 ms for 1024x1024, files a tenth larger


class Codec:
    """A pool of threads that encode and decode images, and parse and write large JSON."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="codec")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Runs `work` on a codec thread and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Queues `work`, which must not raise, and returns at once. Any thread may call this."""
        self._pool.submit(work, *arguments)

    async def decode(self, field: str, source: bytes | str, background: int) -> Pixels:
        """Runs the function `decode` on a codec thread."""
        return await self.run(decode, field, source, background)

    async def warm(self) -> None:
        """Loads Pillow's plugins before the first request."""
        for image_format in get_args(ImageFormat):
            pixels = np.zeros((1, 1, 3), dtype=np.uint8)
            await self.decode("image", await self.run(encode, pixels, image_format, 90), 0)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class ImageEncoder:
    """Makes the file, or its base64, of an engine's image; uses the file that the engine made, if there is one."""

    image_format: ImageFormat
    quality: int
    base64: bool

    def __call__(self, image: RawImage) -> bytes:
        file = encode(image.pixels, self.image_format, self.quality) if image.file is None else image.file
        return pybase64.b64encode(file) if self.base64 else file

    def takes_as_is(self, image: RawImage) -> bool:
        """Returns whether the engine's file is the result, so that a call costs nothing."""
        return image.file is not None and not self.base64

    def is_short(self, image: RawImage) -> bool:
        """Returns whether a call takes less than a hop to a codec thread and back, some 0.3 ms."""
        return self.image_format == "png" and image.file is None and image.pixels.size <= SHORT_PIXELS


def encoder(image_format: ImageFormat, quality: int, *, base64: bool) -> ImageEncoder:
    return ImageEncoder(image_format, quality, base64)


def encode(pixels: Pixels, image_format: ImageFormat, quality: int) -> bytes:
    """Returns the file of [height, width, 3] uint8 RGB pixels. `quality` (1 to 100) is for jpeg and webp."""
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
    """Returns [height, width, 3] uint8 RGB of a PNG, JPEG or WebP file: bytes, base64 or a data: URI.

    Takes the first frame of an animation, turns it upright by its EXIF, cuts 16 bits to 8 and ignores colour profiles.
    Transparent parts show `background`, a gray level. A JPEG larger than 2048x2048 is decoded at a half, a quarter or
    an eighth, if that fits. Checks the size before it decompresses.
    Raises InvalidError (422) that names `field`.
    """
    with _opened(field, _content(field, source)) as image:
        return _upright_rgb(image, background)


def read_size(field: str, source: bytes | str) -> tuple[bytes, tuple[int, int]]:
    """Returns the file and the (width, height) of its upright image. Raises as `decode`."""
    content = _content(field, source)
    with _opened(field, content) as image:
        width, height = image.size
        turned = _orientation(image) >= 5  # EXIF: 5 to 8 are rotated by 90 degrees
        return content, (height, width) if turned else (width, height)


def _content(field: str, source: bytes | str) -> bytes:
    content = _from_base64(field, source) if isinstance(source, str) else source
    if len(content) > MAX_IMAGE_BYTES:
        raise _refused(field, f"{len(content)} bytes", f"at most {MAX_IMAGE_BYTES} bytes (8 MiB)")
    return content


@contextmanager
def _opened(field: str, content: bytes) -> Iterator[Image.Image]:
    """Opens an image whose decoded sides are at most MAX_IMAGE_SIDE."""
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
        name = detect_format(content)
        got = f"{len(content)} bytes that cannot be read as an image"
        if name is not None:
            got = f"a {name} file of {len(content)} bytes, which cannot be read here"
        raise _refused(field, got, "png, jpeg or webp") from error
    raise _refused(field, f"an image of {width}x{height}", _size_allowed())


def _shrink(image: Image.Image) -> None:
    """Sets a JPEG that is too large to be decoded at a fraction, within its own transform, if memory allows."""
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
    """Returns the bytes that libjpeg holds of a progressive file until its last scan: 2 for each coefficient."""
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
