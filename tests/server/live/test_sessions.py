"""WS /v1/live: the newest drawing, one picture at a time, and every way a session ends."""

import base64
import json
import socket
from typing import Any

import numpy as np
import pytest
from live_client import LiveClient, Shown, live
from running_server import PATIENCE_S, GatedEngine, Running, Serve, image_file, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from engines.fake import FakeEngine, FaultPlan, expected_pixels
from engines.types import Job, Pixels
from server.live.messages import SUBPROTOCOL

LOOK = {"width": 64, "height": 64, "seed": 7, "output_format": "png"}


def drawing(level: int) -> Pixels:
    """One white stroke on black, whose place says which drawing it is."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[level % 64, :, :] = 255
    return pixels


def job(prompt: str = "a red circle", **fields: Any) -> Job:
    return Job(prompt, seed=7, width=64, height=64, **fields)


def ended(client: LiveClient) -> tuple[int, str]:
    """The close code, and the reason that the last message gave."""
    told = client.said("end")
    with pytest.raises(ConnectionClosed) as closed:
        client.socket.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.reason == told["detail"]
    return closed.value.rcvd.code, told["code"]


def test_a_session_begins_with_what_it_may_ask_for(plain: Running) -> None:
    with live(plain, subprotocols=[SUBPROTOCOL]) as client:
        assert client.socket.subprotocol == SUBPROTOCOL
        assert client.ready["mode"] == "control"
        assert (client.ready["width"], client.ready["steps"]) == (256, [1, 2, 3, 4])
        assert client.ready["conditioning"] == ["control", "image", "image+control", "text"]
        wait_until(lambda: plain.metric("sana_sprint_live_sessions") == 1, "the session")
    wait_until(lambda: plain.metric("sana_sprint_live_sessions") == 0, "its end")


def test_words_alone_then_a_drawing_then_words_again(plain: Running) -> None:
    with live(plain) as client:
        first = client.picture_of(client.set(prompt="a red circle", **LOOK))
        np.testing.assert_array_equal(first.pixels, expected_pixels(job()))
        assert first.header["mode"] == "text"
        drawn = client.picture_of(client.draw(drawing(9)))
        np.testing.assert_array_equal(drawn.pixels, expected_pixels(job(control_image=drawing(9))))
        assert (drawn.header["mode"], drawn.header["seed"]) == ("control", 7)
        weaker = client.picture_of(client.set(control_scale=0.5))  # the drawing stays, and so does the prompt
        np.testing.assert_array_equal(weaker.pixels, expected_pixels(job(control_image=drawing(9), control_scale=0.5)))
        cleared = client.picture_of(client.draw(b""))
        np.testing.assert_array_equal(cleared.pixels, first.pixels)


@pytest.mark.parametrize(("mode", "shows"), [("auto", "image"), ("image", "image"), ("text", "text")])
def test_without_a_controlnet_a_drawing_is_an_image(serve: Serve, mode: str, shows: str) -> None:
    with live(serve(FakeEngine(conditioning=frozenset({"text", "image"})))) as client:
        assert client.ready["mode"] == "image"
        client.draw(drawing(9))
        shown = client.picture_of(client.set(prompt="a red circle", mode=mode, strength=0.25, **LOOK))
        assert shown.header["mode"] == shows
        wanted = job(image=drawing(9), strength=0.25) if shows == "image" else job()
        np.testing.assert_array_equal(shown.pixels, expected_pixels(wanted))


@pytest.mark.parametrize(("image_format", "magic"), [("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_header_and_file_agree(plain: Running, image_format: str, magic: bytes) -> None:
    with live(plain) as client:
        shown = client.picture_of(client.set(prompt="a red circle", width=96, height=64, output_format=image_format))
    assert shown.content.startswith(magic)
    assert shown.pixels.shape == (64, 96, 3)
    header = shown.header
    assert (header["format"], header["width"], header["height"]) == (image_format, 96, 64)
    assert list(header["timings_ms"]) == ["queue", "text", "denoise", "decode", "encode", "total"]
    assert all(ms >= 0 for ms in header["timings_ms"].values())


def test_a_session_keeps_its_seed(plain: Running) -> None:
    with live(plain) as client:
        shown = [client.picture_of(client.set(prompt=prompt)) for prompt in ("a red circle", "a blue square")]
        assert [one.header["seed"] for one in shown] == [client.ready["seed"]] * 2


def test_only_the_newest_drawing_is_made(serve: Serve, gated: GatedEngine) -> None:
    """One job runs; of the drawings that come meanwhile, only the last is ever drawn."""
    running = serve(gated)
    with live(running) as client:
        first = client.set(prompt="a red circle", **LOOK)
        gated.wait_for_batch()
        for level in range(20):
            last = client.draw(drawing(level))
        wait_until(lambda: received(running) == last, "the last drawing")
        gated.gate.set()
        shown = [client.picture(), client.picture()]
        assert [one.sequence for one in shown] == [first, last]
        assert shown[1].header["dropped"] == 19
        np.testing.assert_array_equal(shown[1].pixels, expected_pixels(job(control_image=drawing(19))))
        assert len(gated.batches) == 2
        assert running.metric("sana_sprint_live_drawings_superseded_total") == 19


def test_a_job_that_waits_shows_what_comes_later(serve: Serve, gated: GatedEngine) -> None:
    """A waiting job takes the newest drawing, and keeps its place before a request that came in between."""
    running = serve(gated, max_batch=1)
    blocker = running.later()
    gated.wait_for_batch()
    with live(running) as client:
        client.set(prompt="a red circle", **LOOK)
        running.wait_for_waiting(1)
        behind = running.later("behind")
        running.wait_for_waiting(2)
        for level in range(5):
            last = client.draw(drawing(level))
        wait_until(lambda: waiting_job(running).control_image is not None, "a drawing in the queue")
        wait_until(lambda: np.array_equal(waiting_job(running).control_image, drawing(4)), "the last drawing")
        gated.gate.set()
        shown = client.picture()
        assert shown.sequence == last
        assert shown.header["dropped"] == 4
        np.testing.assert_array_equal(shown.pixels, expected_pixels(job(control_image=drawing(4))))
    assert [blocker.result().status_code, behind.result().status_code] == [200, 200]
    assert [jobs[0].prompt for jobs in gated.seen] == ["a red circle", "a red circle", "behind"]


def test_another_size_keeps_the_place_too(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1)
    requests = [running.later()]
    gated.wait_for_batch()
    with live(running) as client:
        client.set(prompt="live", **LOOK)
        running.wait_for_waiting(1)
        requests.append(running.later("behind", width=96))
        running.wait_for_waiting(2)
        last = client.set(width=96)
        wait_until(lambda: waiting_job(running).width == 96, "the change")
        gated.gate.set()
        assert client.picture().sequence == last
    assert [request.result().status_code for request in requests] == [200, 200]
    assert [jobs[0].prompt for jobs in gated.seen] == ["a red circle", "live", "behind"]


def test_sessions_and_requests_share_batches(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated)
    blocker = running.later()
    gated.wait_for_batch()
    with live(running) as one, live(running) as other:
        for client in (one, other):
            client.set(prompt="live", **LOOK)
        running.wait_for_waiting(2)
        request = running.later("plain")
        running.wait_for_waiting(3)
        gated.gate.set()
        assert blocker.result().status_code == request.result().status_code == 200
        assert [client.picture().sequence for client in (one, other)] == [1, 1]
    assert [len(jobs) for jobs in gated.seen] == [1, 3]


def test_what_is_wrong_is_said_and_the_session_goes_on(plain: Running) -> None:
    with live(plain) as client:
        cases: list[tuple[str | bytes, str, str]] = [
            ("not json", "body", "JSON"),
            ('{"prompt": ""}', "prompt", "1 to 4000 characters"),
            ('{"stregth": 1}', "stregth", "did you mean strength?"),
            ('{"mode": "magic"}', "mode", "auto, text, image, control"),
            (json.dumps({"prompt": "x" * 70_000}), "body", "65536"),
        ]
        for text, field, part in cases:
            number = client.send(text)
            told = client.said("error")
            assert (told["sequence"], told["status"], told["code"]) == (number, 422, "invalid_value")
            assert told["errors"][0]["field"] == field
            assert part in told["detail"]
        good = client.set(prompt="a red circle", **LOOK)
        assert client.picture().sequence == good
        client.draw(b"no picture at all")
        assert client.said("error")["errors"][0]["field"] == "drawing"
        client.draw(drawing(3))
        assert client.picture().header["mode"] == "control"
        client.set(width=100)
        assert "nearest" in client.said("error")["detail"]
        kept = client.draw(drawing(4))
        assert client.picture().sequence == kept
        client.set(width=64, prompt="a blue square")
        assert client.picture().header["width"] == 64


def test_a_failing_job_ends_nothing(serve: Serve) -> None:
    with live(serve(FakeEngine(faults=FaultPlan()))) as client:
        client.set(prompt="[[raise]]", **LOOK)
        told = client.said("error")
        assert (told["status"], told["code"]) == (500, "engine_failed")
        assert client.picture_of(client.set(prompt="a red circle")).header["seed"] == 7


def test_a_full_queue_is_said_once_and_then_the_newest_is_drawn(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_queue=1, max_batch=1)
    requests = [running.later()]
    gated.wait_for_batch()
    requests.append(running.later())
    running.wait_for_waiting(1)
    with live(running) as client:
        client.set(prompt="a red circle", **LOOK)
        assert client.said("error")["code"] == "queue_full"
        last = client.draw(drawing(1))
        gated.gate.set()
        assert client.picture_of(last).sequence == last
    assert [request.result().status_code for request in requests] == [200, 200]


def test_an_idle_session_ends_with_a_reason(serve: Serve) -> None:
    running = serve(live_idle_s=0.05)
    with live(running) as client:
        assert ended(client) == (4408, "idle")
    wait_until(lambda: running.metric("sana_sprint_live_sessions_ended_total", reason="idle") == 1, "the count")


def test_one_session_too_many_is_told_so(serve: Serve) -> None:
    running = serve(live_sessions=1)
    with live(running) as first:
        with pytest.raises(AssertionError, match="too_many_sessions"), live(running):
            pass
        assert first.picture_of(first.set(prompt="a red circle")).sequence == 1
    wait_until(lambda: running.metric("sana_sprint_live_sessions") == 0, "the end of the first")
    with live(running) as second:
        assert second.ready["mode"] == "control"


def test_a_server_that_is_not_ready_says_so(serve: Serve, gated: GatedEngine) -> None:
    running = serve(lambda: gated.gate.wait(PATIENCE_S) and gated, ready=False)
    try:
        with pytest.raises(AssertionError, match="not_ready"), live(running):
            pass
    finally:
        gated.gate.set()


def test_draining_ends_every_session(serve: Serve) -> None:
    running = serve()
    with live(running) as quiet, live(running) as drawing_one:
        drawing_one.picture_of(drawing_one.set(prompt="a red circle"))
        loop = running.service.scheduler.loop
        assert loop is not None
        loop.call_soon_threadsafe(running.service.scheduler.begin_drain)
        drawing_one.set(prompt="a blue square")
        assert ended(drawing_one) == (1012, "draining")
        loop.call_soon_threadsafe(running.live.drain)
        assert ended(quiet) == (1012, "draining")


def test_a_client_that_vanishes_leaves_nothing(serve: Serve, gated: GatedEngine) -> None:
    running = serve(gated, max_batch=1)
    blocker = running.later()
    gated.wait_for_batch()
    with live(running) as client:
        client.set(prompt="a red circle", **LOOK)
        running.wait_for_waiting(1)
        client.socket.socket.shutdown(socket.SHUT_RDWR)  # no farewell
    running.wait_for_waiting(0)
    gated.gate.set()
    assert blocker.result().status_code == 200
    assert running.metric("sana_sprint_live_sessions") == 0
    assert running.metric("sana_sprint_jobs_dropped_total", reason="client_gone") == 1
    assert [len(jobs) for jobs in gated.seen] == [1]


def test_a_client_that_does_not_read_holds_up_only_itself(serve: Serve) -> None:
    running = serve()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    size = {"width": 512, "height": 512}

    def made() -> float:
        return running.metric("sana_sprint_images_total", width="512", height="512", steps="1")

    with live(running, max_size=None, max_queue=1) as slow, live(running) as other:
        slow.draw(noise)
        slow.set(prompt="a red circle", mode="image", strength=0.0, output_format="png", **size)
        # It goes on drawing and stops reading: the server stops making its pictures once buffers are full.
        for seed in range(40):
            slow.set(seed=seed)
            other.picture_of(other.set(prompt=f"circle {seed}", **LOOK))
        assert made() < 20
        assert slow.picture_of(slow.sequence).header["seed"] == 39


def test_a_key_comes_as_header_or_as_subprotocol(serve: Serve, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    running = serve(api_key_file=str(keys), ready=False)
    wait_until(lambda: running.client.get("/health/ready").status_code == 200, "readiness")

    def offered(key: str) -> list[Any]:
        return [SUBPROTOCOL, "bearer." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")]

    refused: list[dict[str, Any]] = [{}, {"subprotocols": offered("wrong")}, {"subprotocols": ["bearer.***"]}]
    for options in refused:
        with pytest.raises(InvalidStatus) as answer, live(running, **options):
            pass
        assert answer.value.response.status_code == 401
        assert json.loads(answer.value.response.body)["code"] == "invalid_api_key"
    allowed: list[dict[str, Any]] = [
        {"additional_headers": {"authorization": "Bearer right"}},
        {"subprotocols": offered("right")},
    ]
    for options in allowed:
        with live(running, **options) as client:
            assert client.socket.subprotocol in (None, SUBPROTOCOL)


@pytest.mark.parametrize(
    ("origin", "origins", "welcome"),
    [
        (None, (), True),
        ("own", (), True),
        ("https://elsewhere.example", (), False),
        ("https://elsewhere.example", ("https://elsewhere.example",), True),
        ("null", ("*",), True),
    ],
)
def test_a_page_of_another_site_may_not_draw(
    serve: Serve, origin: str | None, origins: tuple[str, ...], welcome: bool
) -> None:
    running = serve(cors_origins=origins)
    given = running.url if origin == "own" else origin
    if welcome:
        with live(running, origin=given) as client:
            assert client.ready["idle_s"] == 120
    else:
        with pytest.raises(InvalidStatus) as answer, live(running, origin=given):
            pass
        assert answer.value.response.status_code == 403


def test_a_file_too_large_ends_the_session(plain: Running) -> None:
    """Only the frame's head is sent: bytes left unread would make a reset, which can overtake the close code."""
    head = b"\x82\xff" + (9 * 2**20).to_bytes(8, "big") + bytes(4)  # final binary frame, masked, 9 MiB to come
    with live(plain) as client:
        client.socket.socket.sendall(head)
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_a_jpeg_drawing_is_read_too(plain: Running) -> None:
    with live(plain) as client:
        client.draw(image_file(drawing(3), "JPEG"))
        shown: Shown = client.picture_of(client.set(prompt="a red circle", **LOOK))
        assert shown.header["mode"] == "control"


def received(running: Running) -> int:
    """The number of the newest message that the one open session understood."""
    (session,) = running.live._sessions
    return session._understood


def waiting_job(running: Running) -> Job:
    """The job that is first in the line."""
    queue = running.service.scheduler._queue
    with queue._filled:
        entries = [entry for group in queue._waiting.values() for entry in group.values()]
        return min(entries, key=lambda entry: entry.place).job
