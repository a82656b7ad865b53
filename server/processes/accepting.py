"""Listening sockets, and the connections that come to them. Knows no HTTP.

asyncio's own loop over accept() goes on for a whole backlog after the process has run out of descriptors, with a
traceback for each turn; here it stops, says so once a second, and leaves the connections to the kernel meanwhile.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import resource
import socket
from collections.abc import Callable, Sequence

from server.errors import ListenError
from server.telemetry.logs import RateLimitedLog

BACKLOG = 2048  # as uvicorn
AT_ONCE = 64  # connections taken before others on the event loop get their turn
PAUSE_S = 0.1  # without a descriptor, until the next attempt
SPARE = 8  # descriptors kept for what serves the connections that are there: files of the page, sockets of metrics
ABSENT = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # what an address of a family says that this host has not

logger = logging.getLogger("server.processes")


class Acceptor:
    """Hands each connection that comes to `listeners` (not blocking) to `take`, from `resume` on.

    `check` is called before each; while it raises OSError, what comes waits in the kernel.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        take: Callable[[socket.socket], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        self._listeners = listeners
        self._take = take
        self._check = check or check_room
        self._running = False
        self._again: asyncio.TimerHandle | None = None
        self._log = RateLimitedLog(logger)

    def resume(self) -> None:
        if not self._running:
            self._running = True
            self._watch()

    def pause(self) -> None:
        """What comes waits in the kernel."""
        self._running = False
        self._unwatch()

    def close(self) -> None:
        self.pause()
        for listener in self._listeners:
            listener.close()

    def _watch(self) -> None:
        self._again = None
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _unwatch(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for listener in self._listeners:
            if listener.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            if not self._running:
                return
            try:
                self._check()
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the client left while it waited
                continue
            except OSError as error:
                self._log.warning("new connections wait: %s (limit: %d)", error, open_files_limit())
                self._unwatch()
                self._again = asyncio.get_running_loop().call_later(PAUSE_S, self._watch)
                return
            connection.setblocking(False)
            self._take(connection)


def check_room() -> None:
    """Raises OSError (EMFILE) where no more than SPARE descriptors are left."""
    if _lowest_free() >= open_files_limit() - SPARE:
        raise full()


def full() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def room(most: int) -> int:
    """How many connections this process can still take, counted up to `most`; SPARE descriptors are left beside."""
    limit = open_files_limit() - SPARE
    try:
        lowest = _lowest_free()  # below it none is free
    except OSError:
        return 0
    if limit - lowest > most:
        return most
    try:
        taken = sum(int(name) < limit for name in os.listdir("/proc/self/fd"))
    except OSError:  # no descriptor for the listing, or no /proc
        return max(0, limit - lowest)
    return max(0, limit - taken + (lowest < limit))  # the listing's own is in it


def _lowest_free() -> int:
    lowest = os.dup(0) if _is_open(0) else os.open(os.devnull, os.O_RDONLY)  # the kernel gives the lowest that is free
    os.close(lowest)
    return lowest


def leaves_room(connection: socket.socket) -> bool:
    """Whether SPARE descriptors are left beside this connection."""
    return connection.fileno() < open_files_limit() - SPARE


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def open_files_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files_limit() -> None:
    """To what the host allows: each client is a descriptor, and many hosts begin at 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`, not blocking, all on one port; `::` takes IPv4 as well. Raises ListenError.

    An address of a family that this host has not (localhost is ::1 too) is left out where another is there.
    """
    found: list[socket.socket] = []
    absent: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in dict.fromkeys(addresses):
            chosen = found[0].getsockname()[1] if found else port
            try:
                found.append(_listener(family, kind, protocol, (where[0], chosen, *where[2:])))
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = error
        if absent is not None and not found:
            raise absent
    except OSError as error:
        for listener in found:
            listener.close()
        shown = f"[{host}]" if ":" in host else host
        raise ListenError(f"cannot listen on {shown}:{port}: {error}") from error
    return found


def _listener(family: int, kind: int, protocol: int, where: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_any(str(where[0])))
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def is_any(host: str) -> bool:
    """Whether `host` stands for every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
