"""A local server of the hub's API, for the hub's own client: one repository of files, and network faults."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789" * 4
REPOSITORY = "org/model"


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """One repository. Large files (`.safetensors`) lie on a second host, as on the real hub."""

    files: dict[str, bytes] = field(default_factory=dict)
    repository: str = REPOSITORY
    commit: str = COMMIT
    token: str | None = None  # required of each request
    status: int | None = None  # of every answer of the API
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next responses with content end
    reset: bool = False  # a cut resets the connection
    hold_after: int | None = None  # bytes after which responses with content wait for `release`
    release: threading.Event = field(default_factory=threading.Event)
    corrupted: dict[str, int] = field(default_factory=dict)  # responses with wrong bytes left, by name
    missing: set[str] = field(default_factory=set)  # listed, but 404
    served: list[tuple[str, int]] = field(default_factory=list)  # name and first byte of each response with content
    leaked_tokens: list[str] = field(default_factory=list)  # received by the second host
    address: str = ""
    large: str = ""  # address of the second host

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        variables = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        return variables | more

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_blob(content)}
            if name.endswith(".safetensors"):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def etag(self, name: str) -> str:
        content = self.files[name]
        return hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else git_blob(content)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    second = False  # the host of large files
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        authorization = self.headers.get("authorization")
        if self.second:
            if authorization is not None:
                hub.leaked_tokens.append(authorization)
            self._content(path.removeprefix("/"), {}, body=body)
        elif hub.status is not None:
            self._send(hub.status, b"", {})
        elif hub.token is not None and authorization != f"Bearer {hub.token}":
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif path.startswith("/api/"):
            self._api(path)
        elif (match := re.fullmatch(rf"/{hub.repository}/resolve/{hub.commit}/(.+)", path)) and match[1] in hub.files:
            name = match[1]
            if name in hub.missing:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": hub.commit}
            if name.endswith(".safetensors"):
                size = str(len(hub.files[name]))
                headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": size}
                self._send(302, b"", headers | {"Location": f"{hub.large}/{name}"})
            else:
                self._content(name, headers, body=body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, path: str) -> None:
        hub = self.hub
        if path == f"/api/models/{hub.repository}/tree/{hub.commit}":
            self._send(200, json.dumps(hub.tree()).encode(), {})
        elif path in (f"/api/models/{hub.repository}/revision/{name}" for name in ("main", hub.commit)):
            info = {"_id": "1", "id": hub.repository, "modelId": hub.repository, "sha": hub.commit, "private": False}
            self._send(200, json.dumps(info | {"tags": [], "downloads": 0, "likes": 0, "siblings": []}).encode(), {})
        elif path.startswith(f"/api/models/{hub.repository}/revision/"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _content(self, name: str, headers: dict[str, str], *, body: bool) -> None:
        hub, content, begin = self.hub, self.hub.files[name], 0
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if requested and hub.ranges:
            begin = int(requested[1])
            headers |= {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        if body:
            hub.served.append((name, begin))
            if hub.corrupted.get(name, 0) > 0:
                hub.corrupted[name] -= 1
                content = bytes(len(content))
        cut = hub.cut_after.pop(0) if body and hub.cut_after and name.endswith(".safetensors") else None
        self._send(206 if begin else 200, content[begin:], headers, body=body, cut=cut)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            hold = self.hub.hold_after if cut is None and self.second else None
            self.wfile.write(content[: cut if hold is None else hold])
            if hold is not None:
                self.wfile.flush()
                self.hub.release.wait(30)
                self.wfile.write(content[hold:])
        if cut is not None:
            self.wfile.flush()
            if self.hub.reset:  # close with unsent data: RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Ignores clients that disconnect, which the tests do on purpose."""


@contextmanager
def serving_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """Runs the hub inside the block."""
    hub = Hub(files)
    servers = []
    for second in (False, True):
        server = _Server(("127.0.0.1", 0), type("TheHub", (_Handler,), {"hub": hub, "second": second}))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    # `localhost` is another host to a client, which must not send its token there after a redirect.
    hub.address, hub.large = (
        f"http://{n}:{s.server_port}" for n, s in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
