"""GET /docs loads everything from this server, by relative URLs and without a key."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
from running_server import PATIENCE_S, Running, Serve

PREFIX = "/images/of"


@contextmanager
def proxied(running: Running) -> Iterator[str]:
    """A reverse proxy that serves the server under a prefix."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(PREFIX + "/"):
                self.send_error(404)
                return
            answer = httpx.get(running.url + self.path.removeprefix(PREFIX), timeout=PATIENCE_S)
            self.send_response(answer.status_code)
            for name in ("content-type", "content-security-policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


def named(text: str) -> set[str]:
    """Returns the URLs that a page or a script refers to."""
    return {one or other for one, other in re.findall(r"""(?:src|href)="([^"]+)"|fetch\("([^"]+)"\)""", text)}


def test_the_routes_are_shown_with_what_this_server_holds(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret")
    running = serve(api_key_file=str(keys))
    with proxied(running) as url:
        page = httpx.get(f"{url}/docs")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        found = named(page.text)
        scripts = [name for name in found if name.endswith(".js")]
        assert scripts
        for script in scripts:
            found |= named(httpx.get(urljoin(f"{url}/docs", script)).text)
        assert "openapi.json" in found
        assert not [name for name in found if name.startswith("/") or "//" in name]
        for name in found:
            assert httpx.get(urljoin(f"{url}/docs", name)).status_code == 200, name
        assert httpx.get(urljoin(f"{url}/docs", "openapi.json")).json()["paths"]["/generate"]
        assert httpx.get(f"{running.url}/v1/models").status_code == 401


def test_no_page_names_another_host(plain: Running) -> None:
    for path in ("/", "/docs"):
        page = plain.client.get(path).text
        assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page), path
        assert "cdn" not in page
    assert plain.client.get("/redoc").status_code == 404


def test_the_schema_names_no_root_of_a_host(plain: Running) -> None:
    assert "servers" not in plain.client.get("/openapi.json").json()
