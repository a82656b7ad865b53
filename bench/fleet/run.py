"""One simulation from what was asked: a cell of a large fleet, its figures, and how many cards are enough."""

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

CELL = 16  # cards at least, where a fleet is too large to be simulated whole
EACH = 1.3  # events of a request, batches included
DAY_S = 86_400.0


@dataclass(frozen=True)
class Question:
    """`rate` requests a second on average, in all. `most_events`: beyond them a cell of the fleet is simulated."""

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
    most_events: float = 5e6


@dataclass(frozen=True, slots=True)
class Goal:
    """What "enough cards" means. `refused`: the share that may be refused, late or dropped."""

    p99_ms: float
    refused: float = 0.0001


def cell(question: Question) -> tuple[Question, float]:
    """The question for a part of the fleet, and how many such parts there are.

    Cards are alike and requests come at random, so a part with its share of the traffic behaves as the whole does:
    exactly where a balancer chooses at random, and but for terms of 1 / cards where it takes the better of two.
    """
    fleet, events = question.fleet, question.rate * question.fleet.seconds * EACH
    if question.recorded or fleet.clients or events <= question.most_events:
        return question, 1.0
    if fleet.lost or question.scale != "none":
        raise BenchError(
            f"about {events:.3g} events: with --lose or --scale a fleet is simulated whole; --events {events:.0f} does "
            "it, at about 100,000 a second"
        )
    cards = min(fleet.cards, max(CELL, int(fleet.cards * question.most_events / events)))
    parts = fleet.cards / cards
    return replace(question, fleet=replace(fleet, cards=cards), rate=question.rate / parts), parts


def simulate(question: Question, stages: Stages) -> dict[str, Any]:
    """The figures of one simulation. Milliseconds, images a second. Raises BenchError."""
    asked, parts = cell(question)
    jobs = list({job: None for _, job in asked.recorded}) or [share.job for share in asked.shares]
    fleet, began = asked.fleet, time.perf_counter()
    rules = rule(
        asked.scale,
        target_waiting_jobs=asked.target_waiting_jobs,
        max_batch=fleet.limits.max_batch,
        upscale_delay_s=asked.upscale_delay_s,
        downscale_delay_s=asked.downscale_delay_s,
    )
    out = Simulation(fleet, stages, jobs, rules).run(_arrivals(asked))
    return figures(question, fleet.cards, parts, out) | {
        "stages": stages.source,
        "simulated_s": round(time.perf_counter() - began, 2),
    }


def _arrivals(asked: Question) -> Iterator[tuple[float, Job]]:
    if asked.fleet.clients:
        return iter(())
    if asked.recorded:
        return iter(asked.recorded)
    return stream(asked.arrivals, asked.rate, asked.shares, asked.fleet.seed, asked.period_s)


def figures(question: Question, cards: int, parts: float, out: Outcome) -> dict[str, Any]:
    """`parts`: how many such cells the fleet has. Rates and sums are of the whole fleet."""
    fleet = question.fleet
    seconds = fleet.seconds - fleet.warmup_s
    ms = 1000 * np.frombuffer(out.latencies, dtype=np.float64) if out.latencies else np.zeros(0)
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(ms, [50, 95, 99])) if ms.size else (None,) * 3
    made, failed = ms.size / seconds, out.refused + out.late + out.dropped
    card_hours = out.card_s * parts / 3600
    cost = None
    if question.price is not None and ms.size:
        cost = round(1e6 * question.price * card_hours / (ms.size * parts * fleet.seconds / seconds), 2)
    return {
        "cards": fleet.cards,
        "simulated_cards": cards,
        "rate": question.rate,
        "seconds": fleet.seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "throughput": round(made * parts, 3),
        "goodput": round(int((ms <= question.deadline_ms).sum()) / seconds * parts, 3),
        "refused": round(out.refused * parts),
        "late": round(out.late * parts),
        "dropped": round(out.dropped * parts),
        "asked_again": round(out.asked_again * parts),
        "failed_share": round(failed / max(out.offered, 1), 6),
        "busy_share": round(out.busy_s / max(out.card_s, 1e-9), 4),
        "batch_mean": round(len(out.latencies) / max(out.batches, 1), 3),
        "card_hours": round(card_hours, 3),
        "cost_per_million": cost,
        "cards_over_time": [[round(at, 1), round(count * parts)] for at, count in out.cards][:1000],
        "events": out.events,
    }


def fits(found: dict[str, Any], goal: Goal) -> bool:
    return found["p99_ms"] is not None and found["p99_ms"] <= goal.p99_ms and found["failed_share"] <= goal.refused


def enough(question: Question, stages: Stages, goal: Goal) -> dict[str, Any]:
    """The figures with the fewest cards that reach the goal, found by bisection.

    Raises BenchError where no number of cards does, since one card alone with one request is too slow.
    """
    lowest = _busiest(question, stages)
    low, high = max(1, math.floor(question.rate * lowest)), max(1, math.ceil(question.rate * lowest))

    def ask(cards: int) -> dict[str, Any]:
        return simulate(replace(question, fleet=replace(question.fleet, cards=cards)), stages)

    while not fits(best := ask(high), goal):
        if high > 64 * (low + 1):
            raise BenchError(f"p99 of {goal.p99_ms:g} ms: {high} cards have {best['p99_ms']} ms; it cannot be reached")
        low, high = high, math.ceil(high * 1.25) + (high < 4)
    while high - low > max(1, high // 200):  # half a per cent
        middle = (low + high) // 2
        if fits(found := ask(middle), goal):
            high, best = middle, found
        else:
            low = middle
    return best


def _busiest(question: Question, stages: Stages) -> float:
    """Seconds of a card for one request, in full batches: no fleet can do with less."""
    most = question.fleet.limits.max_batch
    table = stages.table(most, {share.job.key for share in question.shares})
    total = sum(share.share for share in question.shares)
    seconds = [
        min((times.before + jobs * times.each) / jobs for jobs, times in list(enumerate(table[share.job.key]))[1:])
        for share in question.shares
    ]
    return sum(one * share.share for one, share in zip(seconds, question.shares, strict=True)) / total
