"""The parts of server.cluster that need no Ray: autoscaling, retries, arguments."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.cluster import retry
from server.cluster.__main__ import parse
from server.cluster.application import ScalingConfig, application, build
from server.cluster.scaling import IN_FLIGHT, WAITING, ByWaitingJobs
from server.errors import SettingsError
from server.settings import Settings


@dataclass
class Context:
    current_num_replicas: int
    target_num_replicas: int
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None


def jobs(waiting: list[float], inside: list[float]) -> Mapping[str, Mapping[Any, float]]:
    return {WAITING: dict(enumerate(waiting)), IN_FLIGHT: dict(enumerate(inside))}


@pytest.mark.parametrize(
    ("running", "target", "reported", "desired"),
    [
        (2, 2, jobs([0, 0], [8, 8]), 2),  # busy, no job waits
        (2, 2, jobs([10, 6], [18, 14]), 2),  # exactly the target
        (2, 2, jobs([20, 20], [28, 28]), 5),
        (1, 1, jobs([9], [17]), 2),
        (2, 4, jobs([10, 7], [18, 15]), 4),  # two more are starting
        (2, 3, jobs([3, 3], [8, 8]), 3),
        (3, 3, jobs([0, 0, 0], [2, 2, 2]), 2),  # the others hold it in half batches
        (3, 3, jobs([0, 0, 0], [4, 4, 4]), 3),
        (3, 3, jobs([1, 0, 0], [1, 0, 0]), 3),
        (1, 1, jobs([0], [0]), 1),
        (2, 3, {}, 3),  # no replica has reported yet
        (2, 3, None, 3),
    ],
)
def test_replicas_follow_what_waits(
    running: int, target: int, reported: Mapping[str, Mapping[Any, float]] | None, desired: int
) -> None:
    assert ByWaitingJobs(target_waiting_jobs=8, max_batch=8)(Context(running, target, reported)) == (desired, {})


@dataclass
class Proxy:
    """A stand-in for Serve's proxy; `replicas` lists the behaviour of each attempt."""

    replicas: list[str]
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        what = self.replicas.pop(0)
        if what == "dies":
            return
        if what == "fails":
            raise RuntimeError("the proxy itself failed")
        headers = [(b"x-content-type-options", b"nosniff")] if what.startswith("own") else []
        await send({"type": "http.response.start", "status": int(what[-3:]), "headers": headers})
        await send({"type": "http.response.body", "body": what.encode()})


def ask(proxy: Proxy, messages: list[Message], path: str = "/generate") -> list[Message]:
    """Returns the messages that the client receives."""
    sent: list[Message] = []
    waiting = iter(messages)

    async def receive() -> Message:
        return next(waiting)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(retry.RetryMiddleware(proxy)({"type": "http", "method": "POST", "path": path}, receive, send))
    return sent


BODY: list[Message] = [
    {"type": "http.request", "body": b"one", "more_body": True},
    {"type": "http.request", "body": b" two", "more_body": False},
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_DELAYS_S", (0.0, 0.0))


@pytest.mark.parametrize("first", ["dies", "503", "500", "fails"])
def test_a_request_whose_replica_died_is_asked_again(first: str) -> None:
    proxy = Proxy([first, "own 200"])
    answer = ask(proxy, BODY)
    assert [answer[0]["status"], answer[1]["body"]] == [200, b"own 200"]
    assert proxy.bodies == [b"one two"] * 2


@pytest.mark.parametrize("first", ["own 500", "own 503", "own 429", "404", "408"])
def test_an_answer_is_an_answer(first: str) -> None:
    proxy = Proxy([first, "own 200"])
    assert ask(proxy, BODY)[0]["status"] == int(first[-3:])
    assert len(proxy.bodies) == 1


def test_the_last_word_is_the_proxys() -> None:
    assert ask(Proxy(["dies", "dies", "503"]), BODY)[0]["status"] == 503
    assert ask(Proxy(["dies", "dies", "dies"]), BODY) == []


def test_who_left_is_not_asked_for_again() -> None:
    proxy = Proxy(["own 200"])
    assert ask(proxy, [BODY[0], {"type": "http.disconnect"}]) == []
    assert proxy.bodies == []


def test_a_long_body_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "MAX_BUFFERED_BYTES", 4)
    proxy = Proxy(["dies", "own 200"])
    assert ask(proxy, BODY) == []
    assert proxy.bodies == [b"one two"]


def test_the_proxys_own_routes_are_left_alone() -> None:
    assert ask(Proxy(["503", "200"]), BODY, path="/-/healthz")[0]["status"] == 503


def test_flags_are_those_of_the_cluster_and_of_the_server() -> None:
    scale, settings = parse(["--max-replicas", "4", "--gpus", "0.5", "--model", "sprint-0.6b", "--port", "9000"])
    assert scale == ScalingConfig(max_replicas=4, gpus=0.5)
    assert (settings.model, settings.port) == ("sprint-0.6b", 9000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_replicas": "many"}, "--max-replicas: got 'many', allowed: a whole number"),
        ({"gpus": "x"}, "--gpus: got 'x', allowed: a number"),
        ({"replicas": 2}, "arguments: got replicas, allowed: api_key_file"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        application(arguments)


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(SettingsError, match="got 3, 2, allowed: 1 <= min <= max"):
        build(Settings(), ScalingConfig(min_replicas=3, max_replicas=2))
