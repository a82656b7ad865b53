"""Pixels from a GPU to the host: into pinned memory, on a stream of their own, while the next picture is decoded.

nvJPEG makes JPEG files on the card where torchvision is installed; see `jpeg_on_card`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engines.types import Pixels

JpegEncoder = Callable[[Tensor, int], bytes]  # pixels [H, W, 3] uint8 on the card, quality


@dataclass(frozen=True)
class Downloaded:
    """A picture on the host. pixels is empty where the file alone was asked for."""

    pixels: Pixels
    finite: bool
    jpeg: bytes | None = None


class Download(Protocol):
    """A picture on its way."""

    def wait(self) -> Downloaded: ...


class Downloader(Protocol):
    def start(self, pixels: Tensor, finite: Tensor, jpeg_quality: int | None) -> Download:
        """pixels [H, W, 3] uint8, finite []; both the caller's own. jpeg_quality: a JPEG file instead of pixels."""


class _Here:
    def __init__(self, pixels: Tensor, finite: Tensor):
        self._pixels, self._finite = pixels, finite

    def wait(self) -> Downloaded:
        return Downloaded(self._pixels.numpy(), bool(self._finite))


class HostDownloader:
    """For tensors that lie on the host already."""

    def start(self, pixels: Tensor, finite: Tensor, jpeg_quality: int | None) -> Download:  # noqa: ARG002  # a protocol's
        return _Here(pixels, finite)


class _FromCard:
    def __init__(self, card: "CudaDownloader", pixels: Tensor, finite: Tensor, jpeg_quality: int | None):
        self._card, self._pixels, self._quality = card, pixels, jpeg_quality
        card.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(card.stream):
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._finite.copy_(finite, non_blocking=True)
            self._host = None
            if jpeg_quality is None or card.jpeg is None:
                self._host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                self._host.copy_(pixels, non_blocking=True)
            self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
            self._done.record()
        for tensor in (pixels, finite):
            tensor.record_stream(card.stream)

    def wait(self) -> Downloaded:
        if self._host is not None:
            self._done.synchronize()
            pixels: Pixels = np.asarray(self._host)
            return Downloaded(pixels, bool(self._finite))
        assert self._card.jpeg is not None
        assert self._quality is not None
        with torch.cuda.stream(self._card.stream):
            content = self._card.jpeg(self._pixels, self._quality)
        self._done.synchronize()
        return Downloaded(np.empty((0, 0, 3), np.uint8), bool(self._finite), content)


class CudaDownloader:
    """`jpeg` makes files on the card; None: pixels come instead."""

    def __init__(self, jpeg: JpegEncoder | None):
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self.jpeg = jpeg

    def start(self, pixels: Tensor, finite: Tensor, jpeg_quality: int | None) -> Download:
        return _FromCard(self, pixels, finite, jpeg_quality)


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
