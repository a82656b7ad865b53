"""Metrics and log lines of answered requests come a moment later, and are never lost."""

import logging
from contextlib import ExitStack
from functools import partial

import pytest
from running_server import Serve, start, wait_until

import server.telemetry.bookkeeping
from engines.fake import FakeEngine, FaultInjection
from server.errors import EXIT_ENGINE

NEVER_S = 1000.0


def lines(caplog: pytest.LogCaptureFixture, status: int) -> int:
    """Returns how many log lines of POST /generate with this status there are."""
    found = [getattr(record, "fields", {}) for record in caplog.records if record.message == "request"]
    return sum((fields["route"], fields["status"]) == ("/generate", status) for fields in found)


def test_a_request_is_logged_soon(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.http")
    assert serve().generate().status_code == 200
    wait_until(lambda: lines(caplog, 200) == 1, "the log line")


def test_a_scrape_counts_all_that_was_answered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.telemetry.bookkeeping, "DELAY_S", NEVER_S)
    running = serve()
    for number in range(1, 4):
        assert running.generate(seed=number).status_code == 200
        assert running.metric("sana_sprint_requests_total", route="/generate", status="200") == number
        assert running.metric("sana_sprint_images_total", width="64", height="64", steps="1") == number


def test_the_end_of_the_app_loses_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.http")
    monkeypatch.setattr(server.telemetry.bookkeeping, "DELAY_S", NEVER_S)
    with ExitStack() as stack:
        assert start(stack, FakeEngine()).generate().status_code == 200
        assert lines(caplog, 200) == 0
    assert lines(caplog, 200) == 1


def test_a_lost_engine_loses_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.http")
    monkeypatch.setattr(server.telemetry.bookkeeping, "DELAY_S", NEVER_S)
    running = serve(FakeEngine(faults=FaultInjection(broken_from_call=0)))
    assert [running.generate().status_code for _ in range(3)] == [500] * 3
    wait_until(lambda: running.left == [EXIT_ENGINE], "the end of the process")
    assert lines(caplog, 500) == 3


def test_an_error_is_logged_and_the_rest_goes_on(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    running = serve()
    bookkeeping, done = running.service.metrics.bookkeeping, list[int]()
    loop = running.service.scheduler.loop
    assert loop is not None
    for work in (partial(done.append, 1), partial(int, "no number"), partial(done.append, 2)):
        loop.call_soon_threadsafe(bookkeeping.later, work)
    wait_until(lambda: done == [1, 2])
    assert "no number" in caplog.text
