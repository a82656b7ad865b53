"""The lines that a starting server prints: where it listens, and what to try."""


def address(host: str, port: int) -> str:
    """The URL of a server, for someone on its machine."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say_listening(where: str, what: str) -> None:
    print(f"listening on {where}; loading {what}", flush=True)


def say_ready(where: str) -> None:
    """With a line to paste."""
    body = '{"prompt": "a red circle on a white background", "seed": 7}'
    print(f"ready (docs at {where}/docs). Try:")
    print(f"curl -s {where}/generate -H 'content-type: application/json' -d '{body}' -o picture.png", flush=True)
