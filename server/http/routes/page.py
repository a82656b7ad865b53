"""GET /: the web page, whose files lie in server/static."""

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from server.errors import HttpError
from server.http.plain_route import PlainRoute

STATIC = Path(__file__).parents[2] / "static"

router = APIRouter(route_class=PlainRoute)


@router.get("/", include_in_schema=False)
async def page(_: Request) -> Response:
    """The web page."""
    path = STATIC / "index.html"
    if not path.is_file():
        raise HttpError(404, "this installation has no web page; GET /docs lists the routes")
    return FileResponse(path)
