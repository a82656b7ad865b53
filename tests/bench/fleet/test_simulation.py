"""The simulation against arithmetic: the server's queue, refusals, deadlines, losses and scaling on virtual time."""

from dataclasses import replace

import pytest

from bench.fleet.arrivals import ARRIVALS, Share, stream
from bench.fleet.replica import Limits
from bench.fleet.run import LatencyGoal, SimulationConfig, cell, fewest_cards, simulate
from bench.fleet.simulation import Fleet
from bench.fleet.stages import BatchSeconds, Stages, load_stages
from bench.harness.errors import BenchError
from engines.types import Job, powers_of_two

FAKE = load_stages("fake:100")
JOB = Job("", 0, 64, 64)
ONE = (Share(64, 64, 1, 1.0),)


def config(times: list[float], **fleet: object) -> SimulationConfig:
    limits = Limits(max_batch=2, max_queue=3)
    fleet_config = Fleet(**{"cards": 1, "seconds": 10.0, "limits": limits, "routing": "random"} | fleet)  # type: ignore[arg-type]
    return SimulationConfig(fleet_config, 0.0, recorded=tuple((at, JOB) for at in times))


def test_a_request_alone_takes_its_batch_and_what_http_adds() -> None:
    result = simulate(config([0.5]), load_stages("fake:100", http_ms=2.0))
    assert (result["p50_ms"], result["batch_mean"], result["events"]) == (102.0, 1.0, 2)


def test_what_waits_is_batched_when_the_engine_is_free() -> None:
    result = simulate(config([0.0, 0.01, 0.02]), FAKE)  # the second batch begins at 0.1 and holds two
    assert result["batch_mean"] == 1.5
    assert (result["p50_ms"], result["p99_ms"]) == (pytest.approx(180), pytest.approx(190, abs=1))


def test_a_full_queue_refuses_at_once() -> None:
    result = simulate(
        config([0.0, *(0.01 + 0.001 * i for i in range(5))]), FAKE
    )  # one runs, three wait, two are refused
    assert result["refused"] == 2
    assert result["failed_share"] == pytest.approx(2 / 6)


def test_what_cannot_begin_in_time_is_late_and_frees_its_slot() -> None:
    limits = Limits(max_batch=1, max_queue=3, timeout_s=0.15)
    result = simulate(config([0.0, 0.01, 0.02, 0.03, 0.18], limits=limits), FAKE)
    assert (result["late"], result["refused"]) == (2, 0)


@pytest.mark.parametrize("routing", ["two", "random", "connections"])
def test_every_request_is_answered_or_told_why_not(routing: str) -> None:
    fleet = Fleet(3, 60.0, Limits(max_queue=64, timeout_s=0.5), routing=routing)
    result = simulate(SimulationConfig(fleet, 400.0, ONE), FAKE)
    offered = sum(at <= 60.0 for at, _ in _until(60.0))
    answered = round(result["throughput"] * 60.0)
    assert result["late"] > 0
    assert answered + result["late"] + result["refused"] == pytest.approx(offered, abs=2)


def _until(end: float) -> list[tuple[float, Job]]:
    result = []
    for first in stream("poisson", 400.0, ONE, 0, 1.0):
        if first[0] > end:
            return result
        result.append(first)
    return result


def test_images_of_a_batch_come_one_by_one() -> None:
    times = {jobs: BatchSeconds(0.01 * jobs, 0.1) for jobs in powers_of_two(2)}
    stages = Stages("here", {(64, 64, 1): times})
    result = simulate(config([0.0, 0.001, 0.002]), stages)
    assert result["p99_ms"] == pytest.approx(110 + 20 + 200 - 2, rel=0.01)


def test_a_lost_card_is_asked_again_elsewhere() -> None:
    result = simulate(config([0.95, 0.96, 0.97, 0.98], cards=2, lost=((1.0, 1),), start_s=2.0), FAKE)
    assert result["asked_again"] > 0
    assert (result["dropped"], result["refused"]) == (0, 0)
    assert [cards for _, cards in result["cards_over_time"]] == [2, 1, 2]


def test_without_a_card_nothing_is_taken() -> None:
    result = simulate(config([0.5, 1.5, 4.0], lost=((1.0, 1),), start_s=2.0), FAKE)
    assert result["refused"] == 1


def test_clients_that_wait_are_a_closed_loop() -> None:
    fleet = Fleet(1, 10.0, Limits(max_batch=4), clients=4)
    result = simulate(SimulationConfig(fleet, 0.0, shares=ONE), FAKE)
    assert result["throughput"] == pytest.approx(20, rel=0.05)  # batches of one and of three in turn


@pytest.mark.parametrize("scale", ["cluster", "chart"])
def test_replicas_follow_the_load(scale: str) -> None:
    fleet = Fleet(1, 900.0, Limits(max_batch=1), most=10, start_s=5.0)
    result = simulate(SimulationConfig(fleet, 30.0, ONE, scale=scale, price=2.0), FAKE)
    most = max(cards for _, cards in result["cards_over_time"])
    assert 3 < most <= 10
    assert 0 < result["card_hours"] < 10 * 900 / 3600
    assert result["cost_per_million"] == pytest.approx(
        1e6 * 2.0 * result["card_hours"] / (result["throughput"] * 900), rel=1e-2
    )


@pytest.mark.parametrize("kind", ARRIVALS)
def test_arrivals_have_their_rate(kind: str) -> None:
    end = 400.0
    times = []
    for at, _ in stream(kind, 50.0, ONE, 3, end):
        if at > end:
            break
        times.append(at)
    assert times == sorted(times)
    assert len(times) / end == pytest.approx(50, rel=0.15)


def test_enough_cards_are_the_fewest() -> None:
    question = SimulationConfig(Fleet(1, 60.0, Limits(max_batch=1), routing="two"), 35.0, ONE)
    best = fewest_cards(question, FAKE, LatencyGoal(400.0, 0.01))
    fewer = simulate(replace(question, fleet=replace(question.fleet, cards=best["cards"] - 1)), FAKE)
    assert best["p99_ms"] <= 400.0
    assert fewer["p99_ms"] > 400.0 or fewer["failed_share"] > 0.01


def test_a_cell_behaves_as_the_whole_fleet() -> None:
    whole = SimulationConfig(Fleet(128, 60.0, Limits(), routing="two"), 1800.0, ONE, max_events=1e9)
    part = replace(whole, max_events=40_000)
    assert cell(part)[0].fleet.cards < 64
    first, second = simulate(part, FAKE), simulate(whole, FAKE)
    assert first["p50_ms"] == pytest.approx(second["p50_ms"], rel=0.05)
    assert first["p99_ms"] == pytest.approx(second["p99_ms"], rel=0.05)
    assert first["throughput"] == pytest.approx(second["throughput"], rel=0.05)


def test_a_loss_is_not_simulated_in_a_cell() -> None:
    with pytest.raises(BenchError, match="--events"):
        simulate(SimulationConfig(Fleet(100, 600.0, lost=((1.0, 1),)), 1000.0, ONE, max_events=1000), FAKE)
