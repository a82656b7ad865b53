"""Listens on sockets and accepts their connections. Knows no HTTP.

asyncio's own accept loop runs through the whole backlog when the process is out of descriptors, with a traceback each
time. This one stops, logs it once a second, and leaves the connections in the kernel meanwhile.
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
MAX_PER_TURN = 64  # connections accepted before other callbacks of the event loop run
PAUSE_S = 0.1  # between attempts while no descriptor is free
SPARE = 8  # descriptors kept for open connections: files of the page, sockets of metrics
UNSUPPORTED = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # an address family that this host does not have

logger = logging.getLogger("server.processes")


class Acceptor:
    """From `resume` on, passes each new connection of the non-blocking `listeners` to `on_connection`.

    It calls `check` before each. While `check` raises OSError, new connections wait in the kernel.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        on_connection: Callable[[socket.socket], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        self._listeners = listeners
        self._on_connection = on_connection
        self._check = check or check_descriptors
        self._running = False
        self._retry: asyncio.TimerHandle | None = None
        self._log = RateLimitedLog(logger)

    def resume(self) -> None:
        if not self._running:
            self._running = True
            self._watch()

    def pause(self) -> None:
        """Leaves new connections in the kernel."""
        self._running = False
        self._unwatch()

    def close(self) -> None:
        self.pause()
        for listener in self._listeners:
            listener.close()

    def _watch(self) -> None:
        self._retry = None
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _unwatch(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for listener in self._listeners:
            if listener.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_PER_TURN):
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
                self._retry = asyncio.get_running_loop().call_later(PAUSE_S, self._watch)
                return
            connection.setblocking(False)
            self._on_connection(connection)


def check_descriptors() -> None:
    """Raises OSError (EMFILE) if at most SPARE descriptors are free."""
    if _lowest_free() >= open_files_limit() - SPARE:
        raise too_many_files()


def too_many_files() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def free_descriptors(most: int) -> int:
    """Returns how many more connections this process can hold, up to `most`, with SPARE descriptors left."""
    limit = open_files_limit() - SPARE
    try:
        lowest = _lowest_free()  # all below it are in use
    except OSError:
        return 0
    if limit - lowest > most:
        return most
    try:
        used = sum(int(name) < limit for name in os.listdir("/proc/self/fd"))
    except OSError:  # no descriptor for the listing, or no /proc
        return max(0, limit - lowest)
    return max(0, limit - used + (lowest < limit))  # the listing's own descriptor is counted too


def _lowest_free() -> int:
    lowest = os.dup(0) if _is_open(0) else os.open(os.devnull, os.O_RDONLY)  # the kernel returns the lowest free one
    os.close(lowest)
    return lowest


def leaves_spare(connection: socket.socket) -> bool:
    """Returns whether SPARE descriptors are left besides this connection."""
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
    """Raises it to the hard limit: each client needs a descriptor, and many hosts start at 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """Returns a non-blocking socket for each address of `host`, all on one port. `::` accepts IPv4 as well.

    Skips an address family that this host does not have (localhost is ::1 too) if another address works.
    Raises ListenError.
    """
    sockets: list[socket.socket] = []
    unsupported: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            chosen_port = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_listener(family, kind, protocol, (address[0], chosen_port, *address[2:])))
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                unsupported = error
        if unsupported is not None and not sockets:
            raise unsupported
    except OSError as error:
        for listener in sockets:
            listener.close()
        shown = f"[{host}]" if ":" in host else host
        raise ListenError(f"cannot listen on {shown}:{port}: {error}") from error
    return sockets


def _listener(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_wildcard(str(address[0])))
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def is_wildcard(host: str) -> bool:
    """Returns whether `host` means every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
