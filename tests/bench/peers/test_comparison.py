"""bench.peers: every peer gets the same requests and its own environment; a peer without answers gives no figure."""

import json
from typing import Any

import pytest

from bench.harness.summary import percentiles
from bench.peers.__main__ import main
from bench.peers.comparison import PEERS, ROOT, command_of, interpreter_of, make_requests, medians
from bench.report import render


def test_ours_beside_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", "fake:1", "--peers", "ours,fastapi", "--concurrency", "2", "--rates", "40"]
    assert main([*options, "--seconds", "0.3", "--repetitions", "2"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [(row["peer"], row["load"]) for row in result["rows"]] == [
        (peer, load) for peer in ("ours", "fastapi") for load in ("2 clients", "40/s")
    ]
    for row in result["rows"]:
        assert row["lost"] == 0
        assert row["throughput"] > 0
        assert 1 <= row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        assert 0 < row["cpu_ms"] < 1000
        assert row["switches"] > 0
        least, most = row["spread"]["p99"]
        assert least <= row["latency_ms"]["p99"] <= most
        assert least < most
    assert "fake:1 fastapi 40/s" in err
    page = render({"peers": result})["bench.md"]
    assert "| fake:1 | 40/s      | fastapi |" in page
    assert "| CPU, ms | switches |" in page
    without = [{name: row[name] for name in row if name not in ("cpu_ms", "switches")} for row in result["rows"]]
    assert "CPU, ms" not in render({"peers": result | {"rows": without}})["bench.md"]


def test_repetitions_become_medians_sums_and_a_spread() -> None:
    def row(throughput: float, p99: float, lost: int) -> dict[str, Any]:
        times = percentiles([p99])
        return {"load": "1/s", "requests": 9, "lost": lost, "throughput": throughput, "latency_ms": times} | costs

    costs = {"cpu_ms": 1.0, "switches": 2.0}
    found = medians([row(10, 5, 0), row(30, 7, 1), row(20, 90, 0)])
    assert (found["requests"], found["lost"], found["throughput"], found["latency_ms"]["p99"]) == (27, 1, 20, 7)
    assert found["spread"] == {"throughput": [10, 30], "p50": [5, 90], "p99": [5, 90]}
    assert medians([row(0, 1, 9) | {"latency_ms": None}])["latency_ms"] is None
    assert medians([row(1, 1, 0) | {"cpu_ms": None}, row(1, 1, 0)])["cpu_ms"] is None


def test_a_peer_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("bench.peers.comparison.ENVIRONMENTS", tmp_path)
    assert main(["--peers", "ray,bentoml", "--engine", "fake:1"]) == 0
    out = capsys.readouterr().out
    assert "not installed (make peers): ray, bentoml" in out
    assert json.loads(out.splitlines()[-1])["rows"] == []


def test_a_peer_that_ends_shows_its_last_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--peers", "fastapi", "--engine", "no-such-checkpoint"]) == 3
    error = capsys.readouterr().err
    assert "fastapi: not ready" in error
    assert "'no-such-checkpoint' is no folder" in error


def test_all_get_the_same_requests() -> None:
    plain, listed = make_requests("ours", 3, 7), make_requests("bentoml", 3, 7)
    assert [json.loads(request.body()) for request in plain] == [
        json.loads(request.body())["requests"][0] for request in listed
    ]
    assert len({request.seed for request in plain}) == 3


def test_every_peer_has_a_command() -> None:
    commands = {peer: command_of(peer, "models/tiny", 81) for peer in PEERS}
    assert all("81" in words and words[0] == str(interpreter_of(peer)) for peer, words in commands.items())
    assert commands["ours"][3:5] == ["--model", "models/tiny"]
    assert len({words[0] for words in commands.values()}) == 4
    for peer in set(PEERS) - {"ours"}:
        module = f"bench.peers.{peer}_app"
        assert any(word.partition(":")[0] == module for word in commands[peer])
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()


def test_no_repetition_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repetitions", "0"])
    assert "repetitions: got 0, allowed: 1 or more" in capsys.readouterr().err
