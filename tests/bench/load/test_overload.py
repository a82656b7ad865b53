"""bench.load.overload: its counts add up, and every broken bound is named."""

import json
from typing import Any

import pytest

from bench.load.overload import broken, main


def load(p99: float, refused: float | None = None, goodput: float = 80.0, other: int = 0) -> dict[str, Any]:
    return {
        "accepted_ms": {"p99": p99},
        "refused_ms": None if refused is None else {"p99": refused},
        "goodput": goodput,
        "other": other,
    }


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (load(299, 19), None),
        (load(301, 19), "accepted p99 301.0 ms, must be under 300.0 ms"),
        (load(299, 21), "refused p99 21.0 ms, must be under 20 ms"),
        (load(299, 19, goodput=75.0), "goodput 75.0/s, at capacity it was 80.0/s"),
        (load(299, 19, other=1), "1 requests got neither an image nor 429"),
    ],
)
def test_a_broken_bound_is_named(over: dict[str, Any], message: str | None) -> None:
    assert broken(load(100), load(150), over, batch_ms=100) == ([] if message is None else [message])


def test_every_request_gets_an_image_or_429(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--batch-ms", "20", "--seconds", "0.3"])  # too short for its bounds
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["of_capacity"] for row in result["loads"]] == [0.1, 1.0, 4.0]
    for row in result["loads"]:
        counted = sum(row[kind]["count"] for kind in ("accepted_ms", "refused_ms") if row[kind])
        assert (counted, row["other"]) == (row["requests"], 0)
