"""bench.robustness.chaos: a short campaign loses nothing, and one that loses something says so."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from bench.robustness.chaos import main
from bench.robustness.fault import Fault, fault_result
from bench.robustness.restarting_server import RestartingServer
from bench.robustness.scenario import Scenario

SHORT = (
    *("engine exception that passes", "poisonous job", "out of memory in a batch", "NaN", "all-black output"),
    *("clients killed at random points", "slow writers", "slow readers", "half-sent bodies", "full disk"),
    *("SIGTERM under load", "SIGKILL under load, restart", "clock jumps"),
    *("refused prompt", "refused image", "checker that fails"),
    *("more connections than descriptors", "a worker dies, no descriptor left"),
)


def run_chaos(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    assert main([*arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {entry["fault"]: entry for entry in result["rows"]}


def test_a_short_campaign_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_chaos(capsys, "--scale", "0.01", *(word for name in SHORT for word in ("--only", name)))
    assert set(rows) == set(SHORT)
    assert rows["poisonous job"]["hit"] == {"500 engine_failed": 2}
    assert rows["refused prompt"]["hit"] == rows["refused image"]["hit"] == {"422 content_policy_violation": 2}
    assert rows["checker that fails"]["hit"] == {"503 safety_check_failed": 2}
    assert rows["SIGTERM under load"]["hit"] == {"200": 50}
    assert set(rows["SIGKILL under load, restart"]["hit"]) <= {"cut", "200"}
    assert rows["clock jumps"]["hit"] == {"200": 5, "504 deadline_exceeded": 1}


@pytest.mark.slow
def test_the_whole_campaign_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run_chaos(capsys)) == 21


def test_what_a_fault_does_not_excuse_is_lost(tmp_path: Path) -> None:
    async def nothing(_: Scenario) -> Counter[str]:
        return Counter()

    fault = Fault("x", 1, nothing, hit=frozenset({"500 engine_failed"}))
    scenario = Scenario(RestartingServer([], tmp_path / "log"), random.Random(0), 1, never_ok=1)
    result = fault_result(
        fault, scenario, Counter({"500 engine_failed": 3, "silence": 2}), Counter({"200": 9, "200 wrong image": 1})
    )
    assert result.lost == 4
    assert result.lost_what == {"hit: silence": 2, "bystander: 200 wrong image": 1, "never got an image": 1}


def test_a_server_that_is_not_there_is_no_image(tmp_path: Path) -> None:
    async def ask() -> str:
        scenario = Scenario(RestartingServer([], tmp_path / "log"), random.Random(0), 1)
        return await scenario.ask(scenario.new_job())

    assert asyncio.run(ask()) == "refused"


def test_an_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "boredom"])
    assert "allowed: engine exception that passes" in capsys.readouterr().err
