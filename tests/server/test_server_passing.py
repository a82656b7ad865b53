"""What supervisor and worker hand each other."""

import resource
import socket
from collections.abc import Iterator

import pytest

from server import passing
from server.passing import Report


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = passing.channel()
    with ours, theirs:
        yield ours, theirs


def test_a_connection_arrives_and_lives(ends: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = socket.socketpair()
    with client:
        assert passing.pass_on(ends[0], accepted)
        assert accepted.fileno() == -1
        arrived = passing.taken(ends[1])
        assert isinstance(arrived, socket.socket)
        with arrived:
            client.send(b"hello")
            assert arrived.recv(5) == b"hello"
    assert passing.taken(ends[1]) is None


def test_words_and_ends_are_told_apart(ends: tuple[socket.socket, socket.socket]) -> None:
    passing.ask_to_drain(ends[0])
    assert passing.taken(ends[1]) == "drain"
    ends[0].close()
    assert passing.taken(ends[1]) == "closed"
    passing.send_report(ends[1], Report())  # to nobody


def test_a_worker_without_files_to_open_loses_the_connection_and_nothing_else(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    client, accepted = socket.socketpair()
    with client:
        assert passing.pass_on(ends[0], accepted)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert passing.taken(ends[1]) == "lost"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert client.recv(1) == b""


def test_the_newest_report_counts(ends: tuple[socket.socket, socket.socket]) -> None:
    for number in range(3):
        passing.send_report(ends[1], Report("ready", received=number, open=1))
    assert passing.reports(ends[0]) == (Report("ready", 2, 1), True)
    assert passing.reports(ends[0]) == (None, True)
    ends[1].close()
    assert passing.reports(ends[0]) == (None, False)
    with socket.socket() as connection:
        assert not passing.pass_on(ends[0], connection)
        assert connection.fileno() != -1
