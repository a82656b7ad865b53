"""Copies images from a GPU to pinned host memory, on a stream of its own, while the next image decodes.

The GPU encodes files itself: PNG by engines.pipeline.png, JPEG by nvJPEG if torchvision is installed (`jpeg_on_card`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engines.errors import in_one_line
from engines.pipeline.png import is_black, png_file
from engines.types import Job, Pixels

Tensors = Mapping[str, Tensor]
JpegEncoder = Callable[[Tensor, int], bytes]  # planes [3, H, W] uint8 on the GPU, quality

_NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class HostImage:
    """An image on the host. `pixels` is empty if there is a file."""

    pixels: Pixels
    finite: bool
    file: bytes | None = None


class Download(Protocol):
    """A copy in progress."""

    def wait(self) -> HostImage: ...


class Downloader(Protocol):
    def start(self, output: Tensors, job: Job) -> Download:
        """Starts a copy. output: finite [], and pixels [H, W, 3] or the parts of a PNG file (engines.pipeline.png).

        No other call may write to `output`. job: decides whether a JPEG file may replace the pixels.
        """

    def try_jpeg(self) -> str | None:
        """Makes a small JPEG file. Returns the reason if that fails, after which pixels come instead."""


class _HostDownload:
    def __init__(self, output: Tensors, job: Job):
        self._output, self._job = output, job

    def wait(self) -> HostImage:
        return _host_image(self._output, self._job)


class HostDownloader:
    """Takes tensors that are on the host already."""

    def start(self, output: Tensors, job: Job) -> Download:
        return _HostDownload(output, job)

    def try_jpeg(self) -> str | None:
        return None


class _PinnedDownload:
    """A copy of tensors to pinned memory."""

    def __init__(self, stream: Any, output: Tensors, job: Job):
        self._host, self._job = dict[str, Tensor](), job
        for name, tensor in output.items():
            self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self._done.record()

    def wait(self) -> HostImage:
        self._done.synchronize()
        return _host_image(self._host, self._job)


class _JpegDownload:
    """A JPEG file that the GPU makes.

    torchvision has one encoder for all threads. It encodes on a stream of its own, which waits for the stream that was
    current at its first call, or for none, depending on the version (pytorch/vision#8587, #9060). So the host waits
    until the planes are written, and `encode` calls it on the default stream, where no engine works.
    """

    def __init__(self, stream: Any, encode: JpegEncoder, output: Tensors, job: Job):
        pixels = output["pixels"]
        self._planes = pixels.permute(2, 0, 1).contiguous()  # while the host is ahead of the GPU
        # Its end is behind the planes on the same stream.
        self._finite = _PinnedDownload(stream, {"finite": output["finite"], "pixels": pixels[:0]}, job)
        pixels.record_stream(stream)
        self._encode, self._quality = encode, job.jpeg_quality or 90

    def wait(self) -> HostImage:
        image = self._finite.wait()
        return replace(image, pixels=_NO_PIXELS, file=self._encode(self._planes, self._quality))


class CudaDownloader:
    """Copies from a GPU. `jpeg` encodes files there; None: pixels come instead."""

    def __init__(self, jpeg: JpegEncoder | None):
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch's stubs
        self.jpeg = jpeg

    def start(self, output: Tensors, job: Job) -> Download:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if job.jpeg_quality is not None and self.jpeg is not None:
                return _JpegDownload(self.stream, self.jpeg, output, job)
            return _PinnedDownload(self.stream, output, job)

    def try_jpeg(self) -> str | None:
        if self.jpeg is None:
            return None
        try:
            self.jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8, device="cuda"), 90)
        except Exception as error:  # of torchvision or nvJPEG
            torch.cuda.synchronize()  # raises if the device is lost
            self.jpeg = None
            return in_one_line(error)
        return None


def _host_image(host: Tensors, job: Job) -> HostImage:
    finite = bool(host["finite"])
    if "words" not in host:
        return HostImage(host["pixels"].numpy(), finite)
    bits, low, high = host["facts"].tolist()
    facts = (bits, low, high)
    if is_black(facts, job.height):  # the server checks the pixels of black images
        return HostImage(np.zeros((job.height, job.width, 3), np.uint8), finite)
    return HostImage(
        _NO_PIXELS, finite, png_file(host["words"].numpy().view(np.uint8).data, facts, job.height, job.width)
    )


def jpeg_on_card() -> JpegEncoder | None:
    """Returns nvJPEG's encoder of torchvision; None if that is not installed."""
    try:
        from torchvision.io import encode_jpeg
    except (ImportError, RuntimeError, AttributeError, OSError):  # the last three: torchvision does not fit torch
        return None

    def encode(planes: Tensor, quality: int) -> bytes:
        with torch.cuda.stream(torch.cuda.default_stream()):
            content: Tensor = encode_jpeg(planes, quality=quality)
            host = torch.empty(content.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(content, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return host.numpy().tobytes()

    return encode
