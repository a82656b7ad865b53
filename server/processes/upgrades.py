"""Offers to change the protocol (RFC 9110, 7.8). The server accepts a websocket's handshake and ignores all others.

Knows request heads, no sockets.
"""

from collections.abc import Iterable, Sequence

Header = tuple[bytes, bytes]  # name in lower case, value


def offers_websocket(method: str, version: str, headers: Sequence[Header]) -> bool:
    """Returns whether a head asks for a websocket and nothing else (RFC 6455, 4.1)."""
    offered = _tokens(headers, b"upgrade")
    return method == "GET" and version == "1.1" and offered == [b"websocket"]


def announces_body(headers: Iterable[Header]) -> bool:
    """Returns whether a body follows the head, or may."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")
        for name, value in headers
    )


def without_offer(method: str, url: bytes, version: str, headers: Sequence[Header]) -> bytes:
    """Returns the head of the same request without its offer to change the protocol."""
    tokens = [token for token in _tokens(headers, b"connection") if token not in (b"upgrade", b"http2-settings")]
    lines = [method.encode() + b" " + url + b" HTTP/" + version.encode()]
    lines += [
        name + b": " + value for name, value in headers if name not in (b"upgrade", b"connection", b"http2-settings")
    ]
    if tokens:
        lines.append(b"connection: " + b", ".join(tokens))
    return b"\r\n".join([*lines, b"\r\n"])


def _tokens(headers: Iterable[Header], header: bytes) -> list[bytes]:
    """Returns the values of a list header, in lower case, from all its lines."""
    values = [value for name, value in headers if name == header]
    return [token.strip().lower() for value in values for token in value.split(b",") if token.strip()]
