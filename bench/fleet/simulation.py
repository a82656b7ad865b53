"""Simulates the fleet on virtual time: requests, batches, losses, starts and scaling."""

import heapq
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count

from bench.fleet.replica import Limits, Replica, Request, request
from bench.fleet.routing import router
from bench.fleet.scaling import FleetLoad, Rule
from bench.fleet.stages import Stages
from engines.types import Job
from server.cluster.retry import RETRY_DELAYS_S

RETRY_AFTER_S = 1.0  # Retry-After of a refused client of a closed loop


@dataclass(frozen=True, slots=True)
class Fleet:
    """Cards and their settings. `lost`: (second, cards) that fail; each returns after a cold start of `start_s`."""

    cards: int
    seconds: float
    limits: Limits = field(default_factory=Limits)
    routing: str = "two"
    lost: tuple[tuple[float, int], ...] = ()
    start_s: float = 0.0
    least: int = 1
    most: int = 1
    clients: int = 0  # closed loop: each sends its next request when it has a response
    warmup_s: float = 0.0  # requests that arrive before are not counted
    seed: int = 0


@dataclass
class Outcome:
    """Counts of a simulation. `latencies`: seconds of answered requests. `cards`: (second, ready)."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    offered: int = 0
    refused: int = 0  # 429, or 503 while no card is ready
    late: int = 0  # 504
    dropped: int = 0  # in flight on a failed card, and not completed by a retry
    retries: int = 0
    events: int = 0
    batches: int = 0
    busy_s: float = 0.0
    card_s: float = 0.0  # cold starts included
    cards: list[tuple[float, int]] = field(default_factory=list)


class EventKind(IntEnum):
    FREE = 0
    READY = 1
    AGAIN = 2
    LOSS = 3
    SCALE = 4
    CLIENT = 5


class Simulation:
    """One simulation; runs once."""

    def __init__(self, fleet: Fleet, stages: Stages, jobs: Sequence[Job], rule: Rule | None = None) -> None:
        self._fleet, self._stages, self._rule, self._jobs = fleet, stages, rule, jobs
        self._table = stages.table(fleet.limits.max_batch, {job.key for job in jobs})
        self._router = router(fleet.routing, fleet.seed)
        self._rng = random.Random(f"{fleet.seed} losses")
        self._now = 0.0
        self._events: list[tuple[float, int, EventKind, Replica | Request | int | None]] = []
        self._numbers = count()
        self._out = Outcome()
        self._ready = [self._replica() for _ in range(fleet.cards)]
        self._retired: list[Replica] = []
        self._starting = 0
        self._paid_since = 0.0

    def run(self, arrivals: Iterator[tuple[float, Job]]) -> Outcome:
        """Runs until `seconds` have passed and all accepted requests are answered."""
        fleet, events = self._fleet, self._events
        self._out.cards.append((0.0, len(self._ready)))
        for at, cards in fleet.lost:
            self._schedule(at, EventKind.LOSS, cards)
        if self._rule is not None:
            self._schedule(self._rule.every_s, EventKind.SCALE, None)
        for client in range(fleet.clients):
            self._schedule(0.0, EventKind.CLIENT, client)
        arriving, job = next(arrivals, (float("inf"), None))
        while True:
            if job is not None and arriving <= fleet.seconds and not (events and events[0][0] < arriving):
                self._now = arriving
                self._arrive(request(job, arriving))
                arriving, job = next(arrivals, (float("inf"), None))
            elif events:
                self._now, _, kind, subject = heapq.heappop(events)
                if self._now <= fleet.seconds or kind in (EventKind.FREE, EventKind.AGAIN):
                    self._handle(kind, subject)
            else:
                break
        return self._ended()

    def _ended(self) -> Outcome:
        outcome, end = self._out, max(self._now, self._fleet.seconds)
        self._count_card_seconds(min(end, self._fleet.seconds))
        for replica in (*self._ready, *self._retired):
            replica.advance(float("inf"))
            self._count(replica)
        return outcome

    def _count(self, replica: Replica) -> None:
        """Adds the counts of a replica that has ended."""
        self._out.late += replica.late
        self._out.busy_s += replica.busy_s

    def _replica(self) -> Replica:
        return Replica(self._fleet.limits, self._table, self._stages, self._clock, self._answered)

    def _clock(self) -> float:
        return self._now

    def _schedule(self, at: float, kind: EventKind, subject: Replica | Request | int | None) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, subject))

    def _handle(self, kind: EventKind, subject: Replica | Request | int | None) -> None:
        if kind is EventKind.FREE:
            assert isinstance(subject, Replica)
            if not subject.failed:
                subject.busy = False
                self._start_batches(subject)
        elif kind is EventKind.AGAIN:
            assert isinstance(subject, Request)
            self._arrive(subject)
        elif kind is EventKind.CLIENT:
            assert isinstance(subject, int)
            self._arrive(request(self._jobs[0], self._now, subject))
        elif kind is EventKind.READY:
            self._starting -= 1
            self._ready.append(self._replica())
            self._out.cards.append((self._now, len(self._ready)))
        elif kind is EventKind.LOSS:
            assert isinstance(subject, int)
            self._fail_cards(subject)
        else:
            self._scale()

    def _arrive(self, request: Request) -> None:
        outcome, now = self._out, self._now
        outcome.events += 1
        is_counted = request.arrived >= self._fleet.warmup_s
        outcome.offered += is_counted and not request.attempts
        if not self._ready:
            outcome.refused += is_counted
            return
        if self._fleet.routing == "connections":
            for entry in self._ready:
                entry.advance(now)
        replica = self._router.choose(request, self._ready, now)
        replica.advance(now)
        if not replica.submit(request, now):
            outcome.refused += is_counted
            self._router.answered(request)
            if self._fleet.clients:
                self._schedule(now + RETRY_AFTER_S, EventKind.CLIENT, request.client)
        elif not replica.busy:
            self._start_batches(replica)

    def _start_batches(self, replica: Replica) -> None:
        """Starts a batch of waiting jobs if the engine is free, as server.generation.engine_thread does."""
        outcome = self._out
        replica.advance(self._now)
        while replica.queue.waiting and not replica.busy:
            started = replica.start_batch(self._now)
            if started.completions:
                outcome.events += 1
                outcome.batches += 1
                self._schedule(started.free, EventKind.FREE, replica)
            if self._fleet.clients:
                for at, request in started.completions:
                    self._schedule(at, EventKind.CLIENT, request.client)

    def _answered(self, at: float, request: Request) -> None:
        if request.arrived >= self._fleet.warmup_s:
            self._out.latencies.append(at - request.arrived)
        self._router.answered(request)

    def _fail_cards(self, cards: int) -> None:
        """Fails cards and starts others; the proxy retries what was in flight (server.cluster.retry)."""
        for _ in range(min(cards, len(self._ready))):
            replica = self._ready.pop(self._rng.randrange(len(self._ready)))
            replica.advance(self._now)
            self._count(replica)
            for entry in replica.fail():
                if entry.attempts < len(RETRY_DELAYS_S):
                    again = request(entry.job, entry.arrived, entry.client, entry.attempts + 1)
                    self._out.retries += 1
                    self._schedule(self._now + RETRY_DELAYS_S[entry.attempts], EventKind.AGAIN, again)
                else:
                    self._out.dropped += 1
            self._start()
        self._out.cards.append((self._now, len(self._ready)))

    def _start(self) -> None:
        self._starting += 1
        self._schedule(self._now + self._fleet.start_s, EventKind.READY, None)

    def _scale(self) -> None:
        assert self._rule is not None
        for replica in self._ready:
            replica.advance(self._now)
        waiting = sum(replica.queue.waiting for replica in self._ready)
        in_flight = sum(replica.queue.in_flight for replica in self._ready)
        target = len(self._ready) + self._starting
        wanted = self._rule.wanted(self._now, FleetLoad(waiting, in_flight, len(self._ready), target))
        wanted = min(max(wanted, self._fleet.least), self._fleet.most)
        self._count_card_seconds(self._now)
        for _ in range(wanted - target):
            self._start()
        if wanted < len(self._ready):
            self._retired += self._ready[wanted:]  # they finish their jobs and get no more
            del self._ready[wanted:]
            self._out.cards.append((self._now, len(self._ready)))
        self._schedule(self._now + self._rule.every_s, EventKind.SCALE, None)

    def _count_card_seconds(self, until: float) -> None:
        self._out.card_s += (until - self._paid_since) * (len(self._ready) + self._starting)
        self._paid_since = until
