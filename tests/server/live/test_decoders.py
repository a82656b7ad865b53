"""Two decoders in live drawing: the fast one while messages come, the full one when the pen rests."""

from collections.abc import Iterator

import numpy as np
import pytest
from live_client import LiveImage, live
from running_server import PATIENCE_S, Running, Serve

from engines.fake import FakeEngine, expected_pixels
from engines.types import DecoderName, Job, Pixels
from server.live import session

LOOK = {"width": 64, "height": 64, "seed": 7, "output_format": "png"}


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(FakeEngine(fast_decoder="taesana"))


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pen never rests."""
    monkeypatch.setattr(session, "REST_S", PATIENCE_S)
    return None


def drawing(row: int) -> Pixels:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[row] = 255
    return pixels


def job(decoder: DecoderName, row: int | None = None) -> Job:
    drawn = None if row is None else drawing(row)
    return Job("a red circle", 7, 64, 64, decoder=decoder, control_image=drawn)


def check(shown: LiveImage, wanted: Job) -> None:
    assert shown.header["decoder"] == wanted.decoder
    np.testing.assert_array_equal(shown.pixels, expected_pixels(wanted))


def test_the_fast_image_is_followed_by_the_full_one_when_the_pen_rests(running: Running) -> None:
    with live(running) as client:
        assert client.ready["decoders"] == ["full", "fast"]
        first = client.set(prompt="a red circle", **LOOK)
        check(client.image(), job("fast"))
        check(client.image(), job("full"))
        for row in (9, 20):
            number = client.draw(drawing(row))
            interim, final = client.image(), client.image()
            check(interim, job("fast", row))
            check(final, job("full", row))
            assert interim.sequence == final.sequence == number > first
            assert final.header["dropped"] == 0
    assert running.metric("sana_sprint_live_image_duration_seconds_count") == 3


@pytest.mark.usefixtures("no_rest")
def test_while_the_pen_moves_every_image_is_the_fast_one(running: Running) -> None:
    with live(running) as client:
        client.set(prompt="a red circle", **LOOK)
        for row in range(8):
            check(client.image_of(client.draw(drawing(row))), job("fast", row))


@pytest.mark.parametrize("decoder", ["fast", "full"])
def test_a_client_may_choose_one_for_all_its_images(running: Running, decoder: DecoderName) -> None:
    with live(running) as client:
        client.set(prompt="a red circle", decoder=decoder, **LOOK)
        check(client.image(), job(decoder))
        client.draw(drawing(5))
        check(client.image(), job(decoder, 5))


def test_a_drawing_in_the_rest_gets_the_fast_decoder_and_then_its_own_full_image(running: Running) -> None:
    """The full image of the drawing before it is either sent or skipped, and never comes after."""
    with live(running) as client:
        client.set(prompt="a red circle", **LOOK)
        client.image_of(1)
        last = client.draw(drawing(30))
        images = [client.image_of(last)]
        if images[0].header["decoder"] == "fast":
            images.append(client.image())
        assert [image.sequence for image in images] == [last, last]
        check(images[0], job("fast", 30))
        check(images[1], job("full", 30))


def test_with_one_decoder_there_is_one_image_of_each_drawing(plain: Running) -> None:
    with live(plain) as client:
        assert client.ready["decoders"] == ["full"]
        client.set(prompt="a red circle", **LOOK)
        check(client.image(), job("full"))
        client.draw(drawing(3))
        check(client.image(), job("full", 3))
        client.set(decoder="fast")
        error = client.expect_message("error")
        assert error["detail"].startswith("decoder: got 'fast', loaded: full")
        client.draw(drawing(4))
        check(client.image(), job("full", 4))
