"""Calls a route of a fixed path at once; FastAPI compares the path with the pattern of each route in turn.

The innermost middleware. It also skips what FastAPI puts around its router: an exit stack, and handlers of
HTTPException (their cost: bench/LOG.md).
"""

from collections.abc import Iterable

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.plain_route import PlainRoute


class ExactRoutes:
    """ASGI middleware that calls a PlainRoute by its path and method. All other requests go on to `app`."""

    def __init__(self, app: ASGIApp, *, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {
            (method, route.path): route
            for route in reversed([*routes])  # the first of equal paths wins, as in FastAPI
            if isinstance(route, PlainRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
        else:
            scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
            await route.handle(scope, receive, send)
