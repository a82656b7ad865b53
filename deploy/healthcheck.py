"""Exits with 0 if the server in this container is ready, otherwise with its answer. Needs the standard library only.

    python deploy/healthcheck.py [PID]

It reads the server's port from the kernel, because flags, variables or a free port may have set it, and uses no proxy.
PID is the server's. Without it, the oldest server with this check's SPRINT_ variables is asked, as in a container.
"""

import ipaddress
import os
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

LISTENING = "0A"  # a state in /proc/net/tcp
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def servers(proc: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Yields the ids of processes `python -m server` with these variables, oldest first, without workers."""
    for pid in sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()):
        try:
            command = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
            variables = (proc / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        started_with = dict(line.split("=", 1) for line in variables if "=" in line)
        if (b"-m", b"server") in pairwise(command) and _settings(started_with) == _settings(environment):
            yield pid


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("SPRINT_")}


def addresses(proc: Path, pid: int) -> list[tuple[str, int]]:
    """Returns a process's listening TCP sockets as (address, port). Raises OSError if /proc is not readable."""
    sockets = set()
    for entry in (proc / str(pid) / "fd").iterdir():
        try:
            sockets.add(os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
    result = []
    for name in ("tcp", "tcp6"):
        table = proc / str(pid) / "net" / name
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets:
                address, _, port = fields[1].partition(":")
                result.append((_address(address), int(port, 16)))
    return result


def _address(digits: str) -> str:
    """Parses hex words of 32 bits in this machine's byte order; turns the unspecified address into loopback."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return LOOPBACK[address.version] if address.is_unspecified else str(address)


def ready_addresses(
    arguments: Sequence[str], environment: Mapping[str, str], proc: Path = Path("/proc")
) -> list[tuple[str, int]]:
    """Returns the addresses to ask: those of the process, or the variables' without /proc or a server process."""
    configured = [(LOOPBACK[4], int(environment.get("SPRINT_PORT") or 8000))]
    if not proc.is_dir():
        return configured
    pids = [int(pid) for pid in arguments] or list(servers(proc, environment))
    for pid in pids:
        try:
            listening = addresses(proc, pid)
        except OSError:  # ended meanwhile
            continue
        if listening:
            return listening
    return [] if pids else configured


def main() -> str | None:
    """Returns None if the server is ready, otherwise the message to exit with."""
    targets = ready_addresses(sys.argv[1:], dict(os.environ))
    if not targets:
        return "the server does not listen yet"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    failure = None
    for host, port in targets:
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/health/ready"
        try:
            with direct.open(url, timeout=2.5):
                return None
        except urllib.error.HTTPError as error:
            return f"{url}: {error.code} {error.read(500).decode(errors='replace')}"
        except OSError as error:
            failure = f"{url}: {error}"
    return failure


if __name__ == "__main__":
    sys.exit(main())
