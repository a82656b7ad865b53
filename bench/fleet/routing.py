"""Routing policies of the balancers in front of real servers.

two: the less loaded of two at random (Ray Serve). random: any (a Kubernetes Service). connections: bench.load's client
with the supervisor of `--workers`: the most recently used connection is reused, a new one goes to the worker with the
fewest.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from bench.fleet.replica import Replica, Request

POLICIES = ("two", "random", "connections")


class Router(Protocol):
    def choose(self, request: Request, replicas: Sequence[Replica], now: float, /) -> Replica: ...

    def answered(self, request: Request, /) -> None: ...


class TwoChoices:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def choose(self, _request: Request, replicas: Sequence[Replica], now: float, /) -> Replica:
        count = len(replicas)
        first = replicas[int(self._random() * count)]
        second = replicas[int(self._random() * count)]
        if first is second:
            return first
        first.advance(now)
        second.advance(now)
        return first if first.queue.in_flight <= second.queue.in_flight else second

    def answered(self, _request: Request, /) -> None:
        return


class Random(TwoChoices):
    def choose(self, _request: Request, replicas: Sequence[Replica], _now: float, /) -> Replica:
        return replicas[int(self._random() * len(replicas))]


class Connections:
    """Keep-alive connections, each to one replica."""

    def __init__(self) -> None:
        self._of: list[Replica] = []  # by the number of the connection
        self._idle: list[int] = []

    def choose(self, request: Request, replicas: Sequence[Replica], _now: float, /) -> Replica:
        if self._idle:
            request.client = self._idle.pop()
        else:
            request.client = len(self._of)
            self._of.append(min(replicas, key=lambda replica: sum(first is replica for first in self._of)))
        return self._of[request.client]

    def answered(self, request: Request, /) -> None:
        self._idle.append(request.client)


def router(policy: str, seed: int) -> Router:
    if policy == "connections":
        return Connections()
    return TwoChoices(seed) if policy == "two" else Random(seed)
