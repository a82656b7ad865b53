"""Runs a simulation, reduces it to figures, and searches for the fewest cards."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.fleet.arrivals import Share, stream
from bench.fleet.scaling import rule
from bench.fleet.simulation import Fleet, Outcome, Simulation
from bench.fleet.stages import Stages
from bench.harness.errors import BenchError
from engines.types import Job

MIN_CELL_CARDS = 16  # cards at least, where a fleet is too large to be simulated whole
EVENTS_PER_REQUEST = 1.3  # batches included
DAY_S = 86_400.0


@dataclass(frozen=True)
class SimulationConfig:
    """A fleet and its load. `rate`: requests a second in all. `max_events`: beyond it, a part is simulated."""

    fleet: Fleet
    rate: float
    shares: tuple[Share, ...] = (Share(1024, 1024, 1, 1.0),)
    arrivals: str = "poisson"
    period_s: float = DAY_S
    recorded: tuple[tuple[float, Job], ...] = ()
    scale: str = "none"
    target_waiting_jobs: int = 8
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    deadline_ms: float = 1000.0
    price: float | None = None  # of a card for an hour
    max_events: float = 5e6


@dataclass(frozen=True, slots=True)
class LatencyGoal:
    """A goal for the fleet. `refused_share`: the share that may be refused, late or dropped."""

    p99_ms: float
    refused_share: float = 0.0001


def cell(config: SimulationConfig) -> tuple[SimulationConfig, float]:
    """Returns the simulation of a part of the fleet, and how many such parts the fleet has.

    Cards are alike and requests come at random, so a part with its share of the traffic behaves as the whole. This is
    exact for a random balancer, and exact up to 1 / cards for the better of two.
    """
    fleet, events = config.fleet, config.rate * config.fleet.seconds * EVENTS_PER_REQUEST
    if config.recorded or fleet.clients or events <= config.max_events:
        return config, 1.0
    if fleet.lost or config.scale != "none":
        raise BenchError(
            f"about {events:.3g} events: with --lose or --scale a fleet is simulated whole; --events {events:.0f} does "
            "it, at about 100,000 a second"
        )
    cards = min(fleet.cards, max(MIN_CELL_CARDS, int(fleet.cards * config.max_events / events)))
    parts = fleet.cards / cards
    return replace(config, fleet=replace(fleet, cards=cards), rate=config.rate / parts), parts


def simulate(config: SimulationConfig, stages: Stages) -> dict[str, Any]:
    """Returns the figures of one simulation. Milliseconds, images a second. Raises BenchError."""
    part, parts = cell(config)
    jobs = list({job: None for _, job in part.recorded}) or [share.job for share in part.shares]
    fleet, began = part.fleet, time.perf_counter()
    rules = rule(
        part.scale,
        target_waiting_jobs=part.target_waiting_jobs,
        max_batch=fleet.limits.max_batch,
        upscale_delay_s=part.upscale_delay_s,
        downscale_delay_s=part.downscale_delay_s,
    )
    outcome = Simulation(fleet, stages, jobs, rules).run(_arrivals(part))
    return figures(config, fleet.cards, parts, outcome) | {
        "stages": stages.source,
        "simulated_s": round(time.perf_counter() - began, 2),
    }


def _arrivals(part: SimulationConfig) -> Iterator[tuple[float, Job]]:
    if part.fleet.clients:
        return iter(())
    if part.recorded:
        return iter(part.recorded)
    return stream(part.arrivals, part.rate, part.shares, part.fleet.seed, part.period_s)


def figures(config: SimulationConfig, cards: int, parts: float, outcome: Outcome) -> dict[str, Any]:
    """Reduces an outcome to figures; rates and sums are of the whole fleet, which has `parts` such parts."""
    fleet = config.fleet
    seconds = fleet.seconds - fleet.warmup_s
    ms = 1000 * np.frombuffer(outcome.latencies, dtype=np.float64) if outcome.latencies else np.zeros(0)
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(ms, [50, 95, 99])) if ms.size else (None,) * 3
    throughput, failed = ms.size / seconds, outcome.refused + outcome.late + outcome.dropped
    card_hours = outcome.card_s * parts / 3600
    cost = None
    if config.price is not None and ms.size:
        cost = round(1e6 * config.price * card_hours / (ms.size * parts * fleet.seconds / seconds), 2)
    return {
        "cards": fleet.cards,
        "simulated_cards": cards,
        "rate": config.rate,
        "seconds": fleet.seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "throughput": round(throughput * parts, 3),
        "goodput": round(int((ms <= config.deadline_ms).sum()) / seconds * parts, 3),
        "refused": round(outcome.refused * parts),
        "late": round(outcome.late * parts),
        "dropped": round(outcome.dropped * parts),
        "asked_again": round(outcome.retries * parts),
        "failed_share": round(failed / max(outcome.offered, 1), 6),
        "busy_share": round(outcome.busy_s / max(outcome.card_s, 1e-9), 4),
        "batch_mean": round(len(outcome.latencies) / max(outcome.batches, 1), 3),
        "card_hours": round(card_hours, 3),
        "cost_per_million": cost,
        "cards_over_time": [[round(at, 1), round(count * parts)] for at, count in outcome.cards][:1000],
        "events": outcome.events,
    }


def meets(result: dict[str, Any], goal: LatencyGoal) -> bool:
    return (
        result["p99_ms"] is not None
        and result["p99_ms"] <= goal.p99_ms
        and result["failed_share"] <= goal.refused_share
    )


def fewest_cards(config: SimulationConfig, stages: Stages, goal: LatencyGoal) -> dict[str, Any]:
    """Returns the figures with the fewest cards that reach the goal, by bisection.

    Raises BenchError if no number of cards does, because one request alone is too slow.
    """
    lowest = _min_card_seconds(config, stages)
    low, high = max(1, math.floor(config.rate * lowest)), max(1, math.ceil(config.rate * lowest))

    def ask(cards: int) -> dict[str, Any]:
        return simulate(replace(config, fleet=replace(config.fleet, cards=cards)), stages)

    while not meets(best := ask(high), goal):
        if high > 64 * (low + 1):
            raise BenchError(f"p99 of {goal.p99_ms:g} ms: {high} cards have {best['p99_ms']} ms; it cannot be reached")
        low, high = high, math.ceil(high * 1.25) + (high < 4)
    while high - low > max(1, high // 200):  # half a per cent
        middle = (low + high) // 2
        if meets(result := ask(middle), goal):
            high, best = middle, result
        else:
            low = middle
    return best


def _min_card_seconds(config: SimulationConfig, stages: Stages) -> float:
    """Returns card seconds per request in full batches, a lower bound for every fleet."""
    most = config.fleet.limits.max_batch
    table = stages.table(most, {share.job.key for share in config.shares})
    total = sum(share.share for share in config.shares)
    seconds = [
        min((times.before + jobs * times.each) / jobs for jobs, times in list(enumerate(table[share.job.key]))[1:])
        for share in config.shares
    ]
    return sum(seconds_each * share.share for seconds_each, share in zip(seconds, config.shares, strict=True)) / total
