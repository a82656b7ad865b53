"""GET / and /docs: the web pages in server/static."""

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
    """Serves the web page."""
    return _static("index.html")


@router.get("/docs", include_in_schema=False)
async def docs(_: Request) -> Response:
    """Serves the page that describes the routes, from /openapi.json."""
    return _static("docs.html")


def _static(name: str) -> Response:
    path = STATIC / name
    if not path.is_file():
        raise HttpError(404, "this installation has no web pages; GET /openapi.json lists the routes")
    return FileResponse(path)
