"""What the supervisor and a worker tell each other, over one pair of sockets that keeps messages apart.

Down go connections that the supervisor accepted, as file descriptors (SCM_RIGHTS), and the word to drain. Up go
reports. Knows sockets, nothing of HTTP. Nothing here blocks.
"""

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Literal, Self

State = Literal["unready", "ready", "leaving"]

CONNECTION, DRAIN = b"c", b"d"
STATES: tuple[State, ...] = ("unready", "ready", "leaving")
FORM = struct.Struct("!BQQQ")
ROOM_TOLD = 1024  # connections: more room than this is not counted


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How a worker is: `received` connections since it began, of which `open` are open; `room` for so many more.

    A report may be lost.
    """

    state: State = "unready"
    received: int = 0
    open: int = 0
    room: int = ROOM_TOLD

    def packed(self) -> bytes:
        return FORM.pack(STATES.index(self.state), self.received, self.open, self.room)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        state, received, open_, room = FORM.unpack(data)
        return cls(STATES[state], received, open_, room)


def channel() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def send_connection(end: socket.socket, connection: socket.socket) -> bool:
    """Hands a connection to the worker and closes it here; False where the worker takes none, and it stays open."""
    try:
        socket.send_fds(end, [CONNECTION], [connection.fileno()])
    except OSError:  # gone, or too busy to have read the last few hundred
        return False
    connection.close()
    return True


def send_drain(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # gone already
        end.send(DRAIN)


def receive(end: socket.socket) -> socket.socket | Literal["drain", "lost", "closed"] | None:
    """The next thing that the supervisor sent: a connection, or the word to drain; lost where this process may open no
    further file for a connection; closed where the supervisor is gone; None where nothing waits."""
    try:
        data, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    except BlockingIOError:
        return None
    except OSError:
        return "closed"
    if descriptors:
        return socket.socket(fileno=descriptors[0])
    if data == CONNECTION:
        return "lost"
    return "drain" if data == DRAIN else "closed"


def send_report(end: socket.socket, report: WorkerStatus) -> bool:
    """False where it is lost: the next one says it all again, and a supervisor that is gone needs none."""
    try:
        end.send(report.packed())
    except OSError:
        return False
    return True


def reports(end: socket.socket) -> tuple[WorkerStatus | None, bool]:
    """The newest report that waits, and whether the worker's end is still open."""
    newest = None
    while True:
        try:
            data = end.recv(FORM.size)
        except BlockingIOError:
            return newest, True
        except OSError:
            return newest, False
        if not data:
            return newest, False
        newest = WorkerStatus.unpack(data)
