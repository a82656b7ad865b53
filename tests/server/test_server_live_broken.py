"""Clients of WS /v1/live that break the protocol of websockets: an end like any other, no failure of ours."""

import logging

import pytest
from live_client import live
from running_server import Running, wait_until

from bench.bad_bytes import frame
from server.logs import without_clients_traceback

MASK = b"\x01\x02\x03\x04"
REFUSED = frame(1, b"[]", MASK)  # settings that are none: they get an answer, if there is someone to hear it


@pytest.mark.parametrize(
    "broken",
    [
        REFUSED * 3 + frame(2, b"unmasked", None),
        REFUSED * 3 + frame(1, b"\xff\xfe", MASK),
        REFUSED * 3 + frame(2, b"", MASK, announced=2**62),
        REFUSED * 3 + b"\xf1" + b"\0" * 9,
        REFUSED * 3 + frame(8, b"\xff\xff", MASK),
    ],
)
def test_a_client_that_breaks_the_protocol_just_left(
    plain: Running, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before = plain.metric("sana_sprint_live_sessions_ended_total", reason="client")
    with live(plain) as client:
        client.socket.socket.sendall(broken)
        wait_until(
            lambda: plain.metric("sana_sprint_live_sessions_ended_total", reason="client") == before + 1, "its end"
        )
    assert plain.metric("sana_sprint_live_sessions_ended_total", reason="failed") == 0
    assert "a live session failed" not in caplog.text


def test_text_that_is_not_utf8_costs_one_line_of_log() -> None:
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Invalid", (), (type(error), error, None))
    assert without_clients_traceback(record)
    assert (record.exc_info, record.levelname) == (None, "INFO")
