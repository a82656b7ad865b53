"""JPEG files made on a card that is not there: what the host waits for, and on which stream torchvision is called."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.budget.card import Card
from bench.budget.events import Event, Transfer, Wait
from engines.pipeline.download import CudaDownloader, jpeg_on_card
from engines.types import Job

CUDA = torch.device("cuda")


class Encoder:
    """Stands in for torchvision.io. Keeps the events of the card and the stream of each call."""

    def __init__(self, card: Card):
        self.card, self.stream = card, "own"
        self.calls: list[tuple[list[Event], str, list[int], int]] = []

    def encode_jpeg(self, planes: Tensor, quality: int) -> Tensor:
        assert planes.is_contiguous()
        self.calls.append((list(self.card.events), self.stream, list(planes.shape), quality))
        return torch.empty(1000, dtype=torch.uint8, device=CUDA)

    @contextmanager
    def use(self, stream: str) -> Iterator[None]:
        outside, self.stream = self.stream, stream
        yield
        self.stream = outside


@pytest.fixture
def card() -> Card:
    return Card("H100", 132, (9, 0))


@pytest.fixture
def encoder(card: Card, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    made = Encoder(card)
    package: Any = ModuleType("torchvision.io")
    package.encode_jpeg = made.encode_jpeg
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", package)
    return made


@pytest.mark.parametrize("error", [RuntimeError("Failed to create nvjpeg handle: 7\nmore"), AttributeError("no op")])
def test_without_nvjpeg_pixels_come(
    error: Exception, card: Card, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> Tensor:
        raise error

    job = Job("", seed=0, width=64, height=48, jpeg_quality=80)
    with card.present():
        sound = CudaDownloader(jpeg_on_card())
        assert sound.try_jpeg() is None
        assert sound.jpeg is not None
        assert [shape for _, _, shape, _ in encoder.calls] == [[3, 16, 16]]
        monkeypatch.setattr(sys.modules["torchvision.io"], "encode_jpeg", refused)
        downloader = CudaDownloader(jpeg_on_card())
        first_line = str(error).splitlines()[0]
        assert downloader.try_jpeg() == f"{type(error).__name__}: {first_line}"
        pixels = torch.zeros(48, 64, 3, dtype=torch.uint8, device=CUDA)
        output = {"pixels": pixels, "finite": torch.ones((), dtype=torch.bool, device=CUDA)}
        image = downloader.start(output, job).wait()
        assert CudaDownloader(None).try_jpeg() is None
    assert image.file is None
    assert image.pixels.shape == (48, 64, 3)


def test_the_encoder_starts_when_its_planes_are_written(
    card: Card, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own stream may wait for none of ours, so the host must; on the default stream, which all versions know."""
    job = Job("", seed=0, width=64, height=48, jpeg_quality=80)
    with card.present():
        downloader = CudaDownloader(jpeg_on_card())
        monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
        monkeypatch.setattr(torch.cuda, "stream", encoder.use)
        pixels = torch.zeros(48, 64, 3, dtype=torch.uint8, device=CUDA)
        card.clear()
        download = downloader.start({"pixels": pixels, "finite": torch.ones((), dtype=torch.bool, device=CUDA)}, job)
        queued = list(card.events)
        image = download.wait()
        monkeypatch.undo()
    [(before, stream, shape, quality)] = encoder.calls
    assert (stream, shape, quality) == ("default", [3, 48, 64], 80)
    assert not [event for event in queued if isinstance(event, Wait)], "a batch's next image is started meanwhile"
    assert before[: len(queued)] == queued
    assert isinstance(before[-1], Wait)
    assert image.finite
    assert image.file == bytes([1]) * 1000
    assert image.pixels.size == 0
    copies = [event for event in card.events if isinstance(event, Transfer)]
    assert [event.bytes for event in copies if event.bytes > 1] == [1000], "the pixels stay on the card"
    assert all(event.pinned for event in copies)
    assert sum(isinstance(event, Wait) for event in card.events) == 2
