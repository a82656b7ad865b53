"""Offers to change the protocol (RFC 9110, 7.8): which is taken, and what a request is without one that is not.

Only a websocket's handshake is taken. Any other offer is as if it had not been made. Knows heads, no socket.
"""

from collections.abc import Iterable, Sequence

Header = tuple[bytes, bytes]  # name in lower case, value


def offers_websocket(method: str, version: str, headers: Sequence[Header]) -> bool:
    """Whether a head asks for a websocket and for nothing else (RFC 6455, 4.1)."""
    offered = _tokens(headers, b"upgrade")
    return method == "GET" and version == "1.1" and offered == [b"websocket"]


def announces_body(headers: Iterable[Header]) -> bool:
    """Whether a body comes after the head, or might."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")
        for name, value in headers
    )


def without_offer(method: str, url: bytes, version: str, headers: Sequence[Header]) -> bytes:
    """The head of the same request, less what offers to change the protocol."""
    kept = [token for token in _tokens(headers, b"connection") if token not in (b"upgrade", b"http2-settings")]
    lines = [method.encode() + b" " + url + b" HTTP/" + version.encode()]
    lines += [
        name + b": " + value for name, value in headers if name not in (b"upgrade", b"connection", b"http2-settings")
    ]
    if kept:
        lines.append(b"connection: " + b", ".join(kept))
    return b"\r\n".join([*lines, b"\r\n"])


def _tokens(headers: Iterable[Header], wanted: bytes) -> list[bytes]:
    """What a header lists, in lower case, over all its lines."""
    values = [value for name, value in headers if name == wanted]
    return [token.strip().lower() for value in values for token in value.split(b",") if token.strip()]
