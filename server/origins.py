"""Origin checks: an Origin header against the server's own address and the allowed origins (RFC 6454).

CORS hides an answer from a page of another site, but the page can still send forms and open websockets. Therefore the
server checks every request that changes something. Requests without an Origin come from programs and pass.
"""

import re
from collections.abc import Iterable

ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/?#\[\]@:*,\s]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}
ANY_ORIGIN = "*"


def normalise(origin: str) -> str:
    """Returns scheme, host and port in lower case, without a default port. Raises ValueError for other text."""
    match = ORIGIN.fullmatch(origin)
    if match is None:
        raise ValueError(origin)
    scheme, host, port = match[1].lower(), match[2].lower(), match[3]
    if port is None or int(port) == int(DEFAULT_PORTS.get(scheme, "-1")):
        return f"{scheme}://{host}"
    if not 0 < int(port) <= 65535:
        raise ValueError(origin)
    return f"{scheme}://{host}:{int(port)}"


def parse_origin(text: str) -> str:
    """Returns the normal form of an origin in --cors-origins, which may end with a slash. Raises ValueError."""
    return ANY_ORIGIN if text == ANY_ORIGIN else normalise(text.removesuffix("/"))


class Origins:
    """The allowed origins: normalised ones, or ANY_ORIGIN."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)

    @property
    def allows_any(self) -> bool:
        return ANY_ORIGIN in self._allowed

    def allows(self, origin: str) -> bool:
        """Returns True if --cors-origins allows `origin`."""
        try:
            return self.allows_any or normalise(origin) in self._allowed
        except ValueError:  # "null": a page from a file, or in a sandboxed frame
            return False

    def permits(self, origin: str | None, host: str | None) -> bool:
        """Returns True if the request has no Origin, an allowed one, or the origin of its own Host."""
        return origin is None or self.allows(origin) or _is_same_origin(origin, host or "")


def _is_same_origin(origin: str, host: str) -> bool:
    """Returns True if the page came from `host`. Takes the page's scheme: a proxy in front may terminate TLS."""
    scheme = origin.partition("://")[0]
    try:
        return normalise(origin) == normalise(f"{scheme}://{host}")
    except ValueError:
        return False
