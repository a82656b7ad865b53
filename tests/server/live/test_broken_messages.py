"""Clients of WS /v1/live that break the websocket protocol end their session without a failure of the server."""

import pytest
from live_client import live
from running_server import PATIENCE_S, Running, wait_until
from websockets.exceptions import ConnectionClosedError

from bench.robustness.malformed_requests import frame

MASK = b"\x01\x02\x03\x04"
REFUSED = frame(1, b"[]", MASK)  # settings that are none: they get an answer, if there is someone to hear it


@pytest.mark.parametrize(
    "broken",
    [
        REFUSED * 3 + frame(2, b"unmasked", None),
        REFUSED * 3 + frame(1, b"\xff\xfe", MASK),
        REFUSED * 3 + frame(8, b"\x03\xe8", MASK) + frame(1, b"\xff\xfe", MASK),
        REFUSED * 3 + frame(1, b"\xff\xfe", MASK) * 2,
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
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_text_that_is_not_utf8_ends_the_session_with_its_code(plain: Running) -> None:
    with live(plain) as client:
        client.socket.socket.sendall(frame(1, b"\xff\xfe", MASK))
        with pytest.raises(ConnectionClosedError) as closed:
            client.socket.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1007, "text must be UTF-8")
