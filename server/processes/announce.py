"""The lines that a starting server prints: where it listens, and what to try."""

from server.processes.accepting import is_any
from server.processes.saying import say


def server_url(host: str, port: int) -> str:
    """The URL of a server, for someone on its machine."""
    host = "127.0.0.1" if is_any(host) else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def print_listening(where: str, what: str) -> None:
    say(f"listening on {where}; loading {what}")


def print_ready(where: str) -> None:
    """With a line to paste."""
    body = '{"prompt": "a red circle on a white background", "seed": 7}'
    say(f"ready (docs at {where}/docs). Try:")
    say(f"curl -s {where}/generate -H 'content-type: application/json' -d '{body}' -o picture.png")
