"""A FastAPI route that calls its endpoint directly, without dependency injection."""

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class PlainRoute(APIRoute):
    """Calls an endpoint `(request) -> Response`; FastAPI only describes it in /openapi.json.

    No endpoint here uses FastAPI's dependencies, exit stacks and body parsing (their cost: bench/LOG.md).
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = {*(self.methods or ())}
        if "GET" in allowed:
            allowed.add("HEAD")  # same answer; uvicorn omits the body
        if scope["method"] not in allowed:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(allowed))})
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
