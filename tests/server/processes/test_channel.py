"""Messages between supervisor and worker."""

import resource
import socket
from collections.abc import Iterator

import pytest

from server.processes import channel
from server.processes.channel import WorkerStatus


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = channel.channel()
    with ours, theirs:
        yield ours, theirs


def test_a_connection_arrives_and_lives(ends: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = socket.socketpair()
    with client:
        assert channel.send_connection(ends[0], accepted)
        assert accepted.fileno() == -1
        arrived = channel.receive(ends[1])
        assert isinstance(arrived, socket.socket)
        with arrived:
            client.send(b"hello")
            assert arrived.recv(5) == b"hello"
    assert channel.receive(ends[1]) is None


def test_words_and_ends_are_told_apart(ends: tuple[socket.socket, socket.socket]) -> None:
    channel.send_drain(ends[0])
    assert channel.receive(ends[1]) == "drain"
    ends[0].close()
    assert channel.receive(ends[1]) == "closed"
    assert not channel.send_status(ends[1], WorkerStatus())  # to nobody


def test_a_worker_without_files_to_open_loses_the_connection_and_nothing_else(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    client, accepted = socket.socketpair()
    with client:
        assert channel.send_connection(ends[0], accepted)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert channel.receive(ends[1]) == "lost"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert client.recv(1) == b""


def test_the_newest_report_counts(ends: tuple[socket.socket, socket.socket]) -> None:
    for number in range(3):
        assert channel.send_status(ends[1], WorkerStatus("ready", received=number, open=1, room=9))
    assert channel.receive_status(ends[0]) == (WorkerStatus("ready", 2, 1, 9), True)
    assert channel.receive_status(ends[0]) == (None, True)
    ends[1].close()
    assert channel.receive_status(ends[0]) == (None, False)
    with socket.socket() as connection:
        assert not channel.send_connection(ends[0], connection)
        assert connection.fileno() != -1
