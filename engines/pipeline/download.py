"""Pixels from a GPU to the host: into pinned memory, on a stream of their own, while the next picture is decoded.

Files are made on the card where they can be: PNG by engines.pipeline.png, JPEG by nvJPEG where torchvision is
installed; see `jpeg_on_card`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engines.pipeline.png import is_black, png_file
from engines.types import Job, Pixels

Tensors = Mapping[str, Tensor]
JpegEncoder = Callable[[Tensor, int], bytes]  # pixels [H, W, 3] uint8 on the card, quality

_NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class HostImage:
    """A picture on the host. pixels is empty where the file alone was asked for."""

    pixels: Pixels
    finite: bool
    file: bytes | None = None


class Download(Protocol):
    """A picture on its way."""

    def wait(self) -> HostImage: ...


class Downloader(Protocol):
    def start(self, made: Tensors, job: Job) -> Download:
        """made: finite [], and pixels [H, W, 3] or the parts of a PNG file (engines.pipeline.png), all the caller's
        own. job: says whether a JPEG file may come instead of pixels."""


class _Here:
    def __init__(self, made: Tensors, job: Job):
        self._made, self._job = made, job

    def wait(self) -> HostImage:
        return _downloaded(self._made, self._job)


class HostDownloader:
    """For tensors that lie on the host already."""

    def start(self, made: Tensors, job: Job) -> Download:
        return _Here(made, job)


class _FromCard:
    """Tensors on their way to pinned memory."""

    def __init__(self, stream: Any, made: Tensors, job: Job):
        self._host, self._job = dict[str, Tensor](), job
        for name, tensor in made.items():
            self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self._done.record()

    def wait(self) -> HostImage:
        self._done.synchronize()
        return _downloaded(self._host, self._job)


class _JpegOnCard:
    def __init__(self, stream: Any, encode: JpegEncoder, made: Tensors, job: Job):
        self._finite = _FromCard(stream, {"finite": made["finite"], "pixels": made["pixels"][:0]}, job)
        made["pixels"].record_stream(stream)
        self._stream, self._encode, self._pixels, self._quality = stream, encode, made["pixels"], job.jpeg_quality or 90

    def wait(self) -> HostImage:
        with torch.cuda.stream(self._stream):
            content = self._encode(self._pixels, self._quality)
        return replace(self._finite.wait(), pixels=_NO_PIXELS, file=content)


class CudaDownloader:
    """`jpeg` makes files on the card; None: pixels come instead."""

    def __init__(self, jpeg: JpegEncoder | None):
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self.jpeg = jpeg

    def start(self, made: Tensors, job: Job) -> Download:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if job.jpeg_quality is not None and self.jpeg is not None:
                return _JpegOnCard(self.stream, self.jpeg, made, job)
            return _FromCard(self.stream, made, job)


def _downloaded(host: Tensors, job: Job) -> HostImage:
    finite = bool(host["finite"])
    if "words" not in host:
        return HostImage(host["pixels"].numpy(), finite)
    bits, low, high = host["facts"].tolist()
    facts = (bits, low, high)
    if is_black(facts, job.height):  # pixels, which the server looks at
        return HostImage(np.zeros((job.height, job.width, 3), np.uint8), finite)
    return HostImage(
        _NO_PIXELS, finite, png_file(host["words"].numpy().view(np.uint8).data, facts, job.height, job.width)
    )


def jpeg_on_card() -> JpegEncoder | None:
    """nvJPEG through torchvision; None where that is not installed."""
    try:
        from torchvision.io import encode_jpeg
    except (ImportError, RuntimeError):  # a torchvision that does not fit torch raises RuntimeError
        return None

    def encode(pixels: Tensor, quality: int) -> bytes:
        content: Tensor = encode_jpeg(pixels.permute(2, 0, 1).contiguous(), quality=quality)
        return content.cpu().numpy().tobytes()

    return encode
