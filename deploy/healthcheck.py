"""Exits 0 where the server in this container is ready, and with its answer otherwise. The standard library suffices.

    python deploy/healthcheck.py [PID]

Asks the process where the kernel says that it listens, whatever told it so (flags, variables, a free port), and through
no proxy. PID: of the server; otherwise the oldest that was started with the same SPRINT_ variables as this check, as it
was in a container.
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

LISTENS = "0A"  # of /proc/net/tcp
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def servers(proc: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """The processes that are `python -m server` with these variables, oldest first; workers are none."""
    for pid in sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()):
        try:
            words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
            given = (proc / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        theirs = dict(line.split("=", 1) for line in given if "=" in line)
        if (b"-m", b"server") in pairwise(words) and _settings(theirs) == _settings(environment):
            yield pid


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("SPRINT_")}


def addresses(proc: Path, pid: int) -> list[tuple[str, int]]:
    """Returns the TCP addresses (address, port) that a process listens on. Raises OSError if /proc is unreadable."""
    own = set()
    for entry in (proc / str(pid) / "fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
    found = []
    for name in ("tcp", "tcp6"):
        table = proc / str(pid) / "net" / name
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in own:
                address, _, port = fields[1].partition(":")
                found.append((_address(address), int(port, 16)))
    return found


def _address(digits: str) -> str:
    """Words of 32 bits in this machine's order, as hex. The loopback address of the family for all addresses."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return LOOPBACK[address.version] if address.is_unspecified else str(address)


def where(
    arguments: Sequence[str], environment: Mapping[str, str], proc: Path = Path("/proc")
) -> list[tuple[str, int]]:
    """The addresses to ask; that of the variables where no process tells its own."""
    told = [(LOOPBACK[4], int(environment.get("SPRINT_PORT") or 8000))]
    if not proc.is_dir():
        return told
    pids = [int(pid) for pid in arguments] or list(servers(proc, environment))
    for pid in pids:
        try:
            found = addresses(proc, pid)
        except OSError:  # ended meanwhile
            continue
        if found:
            return found
    return [] if pids else told


def main() -> str | None:
    """None where ready; otherwise the line to print before exiting with 1."""
    asked = where(sys.argv[1:], dict(os.environ))
    if not asked:
        return "the server does not listen yet"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    said = None
    for host, port in asked:
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/health/ready"
        try:
            with direct.open(url, timeout=2.5):
                return None
        except urllib.error.HTTPError as error:
            return f"{url}: {error.code} {error.read(500).decode(errors='replace')}"
        except OSError as error:
            said = f"{url}: {error}"
    return said


if __name__ == "__main__":
    sys.exit(main())
