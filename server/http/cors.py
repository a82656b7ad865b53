"""What pages of other sites may do, where --cors-origins allows some."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.origins import EVERY, Origins

SHOWN = ("x-seed", "x-request-id", "x-prompt-truncated", "server-timing", "retry-after")


class Cors(CORSMiddleware):
    """Starlette's, with origins compared as the edge does. Whatever header a page asks for is allowed: clients add
    their own (x-stainless-*), and none of them gives it a right."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        super().__init__(
            app,
            allow_origins=[EVERY] if origins.any else [],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # of an origin that is allowed: a page on the web, a server on this machine
            expose_headers=SHOWN,
        )
        self._origins = origins

    def is_allowed_origin(self, origin: str) -> bool:
        return self._origins.allows(origin)
