"""Delivery of results: encoders hold up neither the engine's thread nor the event loop."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from running_server import PATIENCE_S, GatedEngine, Serve, connect_and_send, wait_until

from engines.types import Deliver, Job, Pixels, RawImage
from server.errors import EXIT_HANG
from server.generation import image_codec
from server.generation.image_codec import ImageFormat

ENCODE = image_codec.encode


class SlowEncoder:
    """Encodes a WebP once the gate is open; `waiting` counts the images that it has begun."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.waiting = 0

    def __call__(self, pixels: Pixels, image_format: ImageFormat, quality: int) -> bytes:
        if image_format == "webp":
            self.waiting += 1
            assert self.gate.wait(PATIENCE_S), "the test never opened the gate"
        return ENCODE(pixels, image_format, quality)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowEncoder]:
    slow = SlowEncoder()
    slow.gate.set()  # for the codec's own warm-up
    monkeypatch.setattr(image_codec, "encode", slow)
    yield slow
    slow.gate.set()


def held(encoder: SlowEncoder) -> None:
    encoder.waiting = 0
    encoder.gate.clear()


def open_engine(**options: int) -> GatedEngine:
    engine = GatedEngine(**options)
    engine.gate.set()
    return engine


def test_the_engine_runs_batch_after_batch_while_no_image_is_encoded(serve: Serve, encoder: SlowEncoder) -> None:
    engine = open_engine(max_batch=1)
    running = serve(engine, max_batch=1, codec_threads=1)
    held(encoder)
    requests = [running.submit_generate(f"prompt {i}", output_format="webp") for i in range(3)]
    wait_until(lambda: len(engine.seen) == 3, "all batches")
    wait_until(lambda: encoder.waiting == 1, "the encoder")  # of one codec thread
    assert not any(one.done for one in requests)
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="encode") == 0
    encoder.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 3
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="encode") == 3
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="decode") == 3


class FileEngine(GatedEngine):
    """Makes JPEG files itself, as a GPU does."""

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        files = {0: None if jobs[0].jpeg_quality is None else b"made by the engine"}

        def with_file(index: int, image: RawImage) -> None:
            assert deliver is not None
            deliver(index, replace(image, file=files[index]))

        return super().generate(jobs, None if deliver is None else with_file)


def test_a_file_of_the_engine_waits_for_no_encoder(serve: Serve, encoder: SlowEncoder) -> None:
    engine = FileEngine(max_batch=1)
    engine.gate.set()
    running = serve(engine, max_batch=1, codec_threads=1)
    held(encoder)
    first = running.submit_generate("holds the encoder", output_format="webp")
    wait_until(lambda: encoder.waiting == 1, "the encoder")
    second = running.generate(output_format="jpeg")
    assert (second.status_code, second.content) == (200, b"made by the engine")
    assert not first.done
    encoder.gate.set()
    assert first.result().status_code == 200
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="encode") == 2


def test_a_small_png_waits_for_no_codec_thread(serve: Serve, encoder: SlowEncoder) -> None:
    running = serve(open_engine(max_batch=1), max_batch=1, codec_threads=1)
    held(encoder)
    first = running.submit_generate("holds the encoder", output_format="webp")
    wait_until(lambda: encoder.waiting == 1, "the encoder")
    second = running.generate()
    assert (second.status_code, second.headers["content-type"]) == (200, "image/png")
    assert not first.done
    encoder.gate.set()
    assert first.result().status_code == 200
    assert running.metric("sana_sprint_stage_duration_seconds_count", stage="encode") == 2


def test_an_image_that_is_made_outlives_its_engine(serve: Serve, encoder: SlowEncoder) -> None:
    running = serve(open_engine(max_batch=1), max_batch=1, batch_timeout_s=0.2, codec_threads=1)
    held(encoder)
    made = running.submit_generate("a red circle", output_format="webp")
    wait_until(lambda: encoder.waiting == 1, "the encoder")
    assert running.generate("[[hang]]").status_code == 500
    encoder.gate.set()
    assert made.result().status_code == 200
    wait_until(lambda: running.left == [EXIT_HANG])


def test_an_encoder_that_fails_fails_its_request_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(open_engine())

    def broken(*_: object, **__: object) -> bytes:
        raise MemoryError("no room for a file")

    monkeypatch.setattr(image_codec, "encode", broken)
    assert running.generate().status_code == 500
    assert "no room for a file" in caplog.text
    monkeypatch.setattr(image_codec, "encode", ENCODE)
    assert running.generate().status_code == 200
    assert running.service.scheduler.in_flight == 0


def test_nothing_is_encoded_for_a_client_that_left(serve: Serve, encoder: SlowEncoder) -> None:
    engine = open_engine(max_batch=1)
    running = serve(engine, max_batch=1, codec_threads=1)
    held(encoder)
    first = running.submit_generate("holds the encoder", output_format="webp")
    wait_until(lambda: encoder.waiting == 1, "the encoder")
    with connect_and_send(running, "leaves", output_format="webp"):
        wait_until(lambda: len(engine.seen) == 2, "its batch")
    wait_until(lambda: running.metric("sana_sprint_requests_total", route="/generate", status="499") == 1)
    encoder.gate.set()
    assert first.result().status_code == 200
    wait_until(lambda: running.metric("sana_sprint_stage_duration_seconds_count", stage="decode") == 2)
    assert encoder.waiting == 1
    assert running.service.scheduler.in_flight == 0
