"""Whose pages may call: an Origin header against the server's own address and those that were allowed (RFC 6454).

CORS keeps a page of another site from reading an answer, not from sending a form, nor from a websocket. Hence every
request that makes something is checked here. Requests without an Origin come from programs, and pass.
"""

import re
from collections.abc import Iterable

ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/?#\[\]@:*,\s]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}
EVERY = "*"


def normal(origin: str) -> str:
    """Scheme, host and port in lower case, without the scheme's own port. Raises ValueError for what is no origin."""
    found = ORIGIN.fullmatch(origin)
    if found is None:
        raise ValueError(origin)
    scheme, host, port = found[1].lower(), found[2].lower(), found[3]
    if port is None or int(port) == int(DEFAULT_PORTS.get(scheme, "-1")):
        return f"{scheme}://{host}"
    if not 0 < int(port) <= 65535:
        raise ValueError(origin)
    return f"{scheme}://{host}:{int(port)}"


def setting(text: str) -> str:
    """An origin as someone writes it: one slash behind it does not count. Raises ValueError."""
    return EVERY if text == EVERY else normal(text.removesuffix("/"))


class Origins:
    """`allowed`: normal ones, or EVERY."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)

    @property
    def any(self) -> bool:
        return EVERY in self._allowed

    def allows(self, origin: str) -> bool:
        """Whether it is one of those that were allowed."""
        try:
            return self.any or normal(origin) in self._allowed
        except ValueError:  # null: a page from a file, or of a frame without rights
            return False

    def admits(self, origin: str | None, host: str | None) -> bool:
        """Whether a request may go on: it has no Origin, an allowed one, or that of the Host that it was sent to."""
        return origin is None or self.allows(origin) or _is_own(origin, host or "")


def _is_own(origin: str, host: str) -> bool:
    """Whether the page came from `host`. The scheme is the page's: a proxy in front may have taken off TLS."""
    scheme = origin.partition("://")[0]
    try:
        return normal(origin) == normal(f"{scheme}://{host}")
    except ValueError:
        return False
