"""The fleet on virtual time: requests, batches, losses, starts and scaling, one event after the other."""

import heapq
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count

from bench.fleet.replica import Limits, Replica, Request, request
from bench.fleet.routing import router
from bench.fleet.scaling import Load, Rule
from bench.fleet.stages import Stages
from engines.types import Job
from server.cluster.retry import RETRY_DELAYS_S

AGAIN_S = 1.0  # of a client of a closed loop that was refused: Retry-After


@dataclass(frozen=True, slots=True)
class Fleet:
    """`lost`: at which second so many cards fail, each to be there again after a cold start of `start_s`."""

    cards: int
    seconds: float
    limits: Limits = field(default_factory=Limits)
    routing: str = "two"
    lost: tuple[tuple[float, int], ...] = ()
    start_s: float = 0.0
    least: int = 1
    most: int = 1
    clients: int = 0  # closed loop: so many, each asking as soon as it has its answer
    warmup_s: float = 0.0  # requests that arrive before are not counted
    seed: int = 0


@dataclass
class Outcome:
    """`latencies`: seconds, of answered requests, in order of the answers of each card. `cards`: (second, ready)."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    offered: int = 0
    refused: int = 0  # 429, or 503 while no card is ready
    late: int = 0  # 504
    dropped: int = 0  # inside of a card that was lost, and not had by asking again
    asked_again: int = 0
    events: int = 0
    batches: int = 0
    busy_s: float = 0.0
    card_s: float = 0.0  # paid for, cold starts included
    cards: list[tuple[float, int]] = field(default_factory=list)


class Kind(IntEnum):
    FREE = 0
    READY = 1
    AGAIN = 2
    LOSS = 3
    SCALE = 4
    CLIENT = 5


class Simulation:
    """Runs once."""

    def __init__(self, fleet: Fleet, stages: Stages, jobs: Sequence[Job], rule: Rule | None = None) -> None:
        self._fleet, self._stages, self._rule, self._jobs = fleet, stages, rule, jobs
        self._table = stages.table(fleet.limits.max_batch, {job.key for job in jobs})
        self._router = router(fleet.routing, fleet.seed)
        self._rng = random.Random(f"{fleet.seed} losses")
        self._now = 0.0
        self._events: list[tuple[float, int, Kind, Replica | Request | int | None]] = []
        self._numbers = count()
        self._out = Outcome()
        self._ready = [self._replica() for _ in range(fleet.cards)]
        self._retired: list[Replica] = []
        self._starting = 0
        self._paid_since = 0.0

    def run(self, arrivals: Iterator[tuple[float, Job]]) -> Outcome:
        """Until `seconds` have passed and all that was let in is answered."""
        fleet, events = self._fleet, self._events
        self._out.cards.append((0.0, len(self._ready)))
        for at, cards in fleet.lost:
            self._at(at, Kind.LOSS, cards)
        if self._rule is not None:
            self._at(self._rule.every_s, Kind.SCALE, None)
        for client in range(fleet.clients):
            self._at(0.0, Kind.CLIENT, client)
        arriving, job = next(arrivals, (float("inf"), None))
        while True:
            if job is not None and arriving <= fleet.seconds and not (events and events[0][0] < arriving):
                self._now = arriving
                self._arrive(request(job, arriving))
                arriving, job = next(arrivals, (float("inf"), None))
            elif events:
                self._now, _, kind, what = heapq.heappop(events)
                if self._now <= fleet.seconds or kind in (Kind.FREE, Kind.AGAIN):
                    self._happen(kind, what)
            else:
                break
        return self._ended()

    def _ended(self) -> Outcome:
        out, end = self._out, max(self._now, self._fleet.seconds)
        self._pay(min(end, self._fleet.seconds))
        for replica in (*self._ready, *self._retired):
            replica.settle(float("inf"))
            self._count(replica)
        return out

    def _count(self, replica: Replica) -> None:
        """What a replica did, once it does no more."""
        self._out.late += replica.late
        self._out.busy_s += replica.busy_s

    def _replica(self) -> Replica:
        return Replica(self._fleet.limits, self._table, self._stages, self._clock, self._answered)

    def _clock(self) -> float:
        return self._now

    def _at(self, at: float, kind: Kind, what: Replica | Request | int | None) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, what))

    def _happen(self, kind: Kind, what: Replica | Request | int | None) -> None:
        if kind is Kind.FREE:
            assert isinstance(what, Replica)
            if not what.gone:
                what.busy = False
                self._go_on(what)
        elif kind is Kind.AGAIN:
            assert isinstance(what, Request)
            self._arrive(what)
        elif kind is Kind.CLIENT:
            assert isinstance(what, int)
            self._arrive(request(self._jobs[0], self._now, what))
        elif kind is Kind.READY:
            self._starting -= 1
            self._ready.append(self._replica())
            self._out.cards.append((self._now, len(self._ready)))
        elif kind is Kind.LOSS:
            assert isinstance(what, int)
            self._lose(what)
        else:
            self._scale()

    def _arrive(self, request: Request) -> None:
        out, now = self._out, self._now
        out.events += 1
        counted = request.arrived >= self._fleet.warmup_s
        out.offered += counted and not request.attempts
        if not self._ready:
            out.refused += counted
            return
        if self._fleet.routing == "connections":
            for one in self._ready:
                one.settle(now)
        replica = self._router.choose(request, self._ready, now)
        replica.settle(now)
        if not replica.offer(request, now):
            out.refused += counted
            self._router.answered(request)
            if self._fleet.clients:
                self._at(now + AGAIN_S, Kind.CLIENT, request.client)
        elif not replica.busy:
            self._go_on(replica)

    def _go_on(self, replica: Replica) -> None:
        """The engine is free: it takes what waits, as server.generation.engine_thread does."""
        out = self._out
        replica.settle(self._now)
        while replica.queue.waiting and not replica.busy:
            begun = replica.begin(self._now)
            if begun.answers:
                out.events += 1
                out.batches += 1
                self._at(begun.free, Kind.FREE, replica)
            if self._fleet.clients:
                for at, request in begun.answers:
                    self._at(at, Kind.CLIENT, request.client)

    def _answered(self, at: float, request: Request) -> None:
        if request.arrived >= self._fleet.warmup_s:
            self._out.latencies.append(at - request.arrived)
        self._router.answered(request)

    def _lose(self, cards: int) -> None:
        """Cards fail; the proxy asks again for what was inside (server.cluster.retry), and others are started."""
        for _ in range(min(cards, len(self._ready))):
            replica = self._ready.pop(self._rng.randrange(len(self._ready)))
            replica.settle(self._now)
            self._count(replica)
            for one in replica.lose():
                if one.attempts < len(RETRY_DELAYS_S):
                    again = request(one.job, one.arrived, one.client, one.attempts + 1)
                    self._out.asked_again += 1
                    self._at(self._now + RETRY_DELAYS_S[one.attempts], Kind.AGAIN, again)
                else:
                    self._out.dropped += 1
            self._start()
        self._out.cards.append((self._now, len(self._ready)))

    def _start(self) -> None:
        self._starting += 1
        self._at(self._now + self._fleet.start_s, Kind.READY, None)

    def _scale(self) -> None:
        assert self._rule is not None
        for replica in self._ready:
            replica.settle(self._now)
        waiting = sum(replica.queue.waiting for replica in self._ready)
        inside = sum(replica.queue.in_flight for replica in self._ready)
        target = len(self._ready) + self._starting
        wanted = self._rule.wanted(self._now, Load(waiting, inside, len(self._ready), target))
        wanted = min(max(wanted, self._fleet.least), self._fleet.most)
        self._pay(self._now)
        for _ in range(wanted - target):
            self._start()
        if wanted < len(self._ready):
            self._retired += self._ready[wanted:]  # they answer what they have, and get no more
            del self._ready[wanted:]
            self._out.cards.append((self._now, len(self._ready)))
        self._at(self._now + self._rule.every_s, Kind.SCALE, None)

    def _pay(self, until: float) -> None:
        self._out.card_s += (until - self._paid_since) * (len(self._ready) + self._starting)
        self._paid_since = until
