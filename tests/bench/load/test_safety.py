"""bench.load.safety: its counts add up, ratios are those of medians, and every broken bound is named."""

import json
from typing import Any

import pytest

from bench.load.safety import main, summarise


def turns(*p99: float, wrong: int = 0) -> list[dict[str, Any]]:
    return [{"latency_ms": {"p50": 1.0, "p99": value, "count": 10}, "refused": 2, "wrong": wrong} for value in p99]


@pytest.mark.parametrize(
    ("refused", "images_are_checked", "broken"),
    [
        (turns(1, 104, 900), False, []),
        (turns(1, 106, 900), False, ["p99 refused/off: 1.06, at most 1.05"]),
        (turns(1, 106, 900), True, []),
        (turns(115, 115, 115), True, ["p99 refused/on: 1.0952, at most 1.05"]),
        (turns(104, 104, 104, wrong=2), True, ["6 wrong answers to the load refused"]),
    ],
)
def test_a_broken_bound_is_named(refused: list[dict[str, Any]], images_are_checked: bool, broken: list[str]) -> None:
    loads = {"off": turns(90, 100, 110), "on": turns(105, 105, 105), "refused": refused}
    result = summarise(loads, images_are_checked=images_are_checked)
    assert result["broken"] == broken
    assert result["p99_ratios"]["on/off"] == 1.05
    assert (result["loads"]["off"]["requests"], result["turns"]) == (30, 3)


def test_the_same_requests_meet_both_servers(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--rate", "40", "--seconds", "0.5", "--share", "0.5", "--turns", "2", "--batch-ms", "1"]
    )  # too short to bound
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    images = {name: (load["requests"], load["refused"], load["wrong"]) for name, load in result["loads"].items()}
    assert images == {"off": (40, 0, 0), "on": (40, 0, 0), "refused": (40, 20, 0)}
