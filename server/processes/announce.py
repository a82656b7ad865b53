"""Prints the lines of a starting server: its address and an example request."""

import os
import sys

from server.processes.accepting import is_wildcard


def server_url(host: str, port: int) -> str:
    """Returns the URL of the server for a client on the same machine."""
    host = "127.0.0.1" if is_wildcard(host) else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def print_listening(url: str, what: str) -> None:
    print_line(f"listening on {url}; loading {what}")


def print_ready(url: str) -> None:
    """Prints the address of the docs and a curl line to paste."""
    body = '{"prompt": "a red circle on a white background", "seed": 7}'
    print_line(f"ready (docs at {url}/docs). Try:")
    print_line(f"curl -s {url}/generate -H 'content-type: application/json' -d '{body}' -o picture.png")


def print_line(line: str) -> None:
    """Prints a line for whoever started the server; serving does not depend on it.

    An ASCII terminal gets escapes. After the reader of a pipe has gone, prints nothing more.
    """
    if sys.stdout is None:  # closed before the start
        return
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process, its last flush included
