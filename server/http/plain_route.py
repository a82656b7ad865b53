"""Routes that are functions of the request and nothing more: FastAPI describes them, and is not asked to call them."""

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class PlainRoute(APIRoute):
    """An endpoint `(request) -> Response`, called as it is.

    Without FastAPI's dependencies, exit stacks and body handling, which no endpoint here uses (cost: bench/LOG.md).
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = {*(self.methods or ())}
        if "GET" in allowed:
            allowed.add("HEAD")  # the same answer; the server leaves its body out
        if scope["method"] not in allowed:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(allowed))})
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
