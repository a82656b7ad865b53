"""Messages between supervisor and worker, over one pair of SOCK_SEQPACKET sockets. Nothing here blocks.

The supervisor sends accepted connections as file descriptors (SCM_RIGHTS), and a drain message. The worker sends its
status. Knows no HTTP.
"""

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Literal, Self

State = Literal["unready", "ready", "leaving"]

CONNECTION, DRAIN = b"c", b"d"
STATES: tuple[State, ...] = ("unready", "ready", "leaving")
STATUS_STRUCT = struct.Struct("!BQQQ")
MAX_ROOM = 1024  # connections; more free room is not counted


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's state, the connections `received` since its start, those `open`, and its `room` for more.

    A status message may be lost.
    """

    state: State = "unready"
    received: int = 0
    open: int = 0
    room: int = MAX_ROOM

    def pack(self) -> bytes:
        return STATUS_STRUCT.pack(STATES.index(self.state), self.received, self.open, self.room)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        state, received, open_, room = STATUS_STRUCT.unpack(data)
        return cls(STATES[state], received, open_, room)


def channel() -> tuple[socket.socket, socket.socket]:
    """Returns the supervisor's end and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def send_connection(end: socket.socket, connection: socket.socket) -> bool:
    """Passes a connection to the worker and closes it here. Returns False, and keeps it open, if that fails."""
    try:
        socket.send_fds(end, [CONNECTION], [connection.fileno()])
    except OSError:  # the worker is gone, or has not read the last few hundred
        return False
    connection.close()
    return True


def send_drain(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the worker is gone
        end.send(DRAIN)


def receive(end: socket.socket) -> socket.socket | Literal["drain", "lost", "closed"] | None:
    """Returns the next message: a connection or "drain"; "lost" (no descriptor left for a connection); "closed" (the
    supervisor is gone); or None."""
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


def send_status(end: socket.socket, status: WorkerStatus) -> bool:
    """Returns False if the message is lost; the next one holds the whole status again."""
    try:
        end.send(status.pack())
    except OSError:
        return False
    return True


def receive_status(end: socket.socket) -> tuple[WorkerStatus | None, bool]:
    """Returns the newest status message, if any, and whether the worker's end is still open."""
    newest = None
    while True:
        try:
            data = end.recv(STATUS_STRUCT.size)
        except BlockingIOError:
            return newest, True
        except OSError:
            return newest, False
        if not data:
            return newest, False
        newest = WorkerStatus.unpack(data)
