"""CORS headers for the origins that --cors-origins allows."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.origins import ANY_ORIGIN, Origins

EXPOSED_HEADERS = ("x-seed", "x-request-id", "x-prompt-truncated", "server-timing", "retry-after")


class Cors(CORSMiddleware):
    """Starlette's CORSMiddleware, with origins compared as RequestMiddleware compares them.

    Allows every request header: clients send their own (x-stainless-*), and no header grants a right.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        super().__init__(
            app,
            allow_origins=[ANY_ORIGIN] if origins.allows_any else [],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # a public page of an allowed origin may call a server on localhost
            expose_headers=EXPOSED_HEADERS,
        )
        self._origins = origins

    def is_allowed_origin(self, origin: str) -> bool:
        return self._origins.allows(origin)
