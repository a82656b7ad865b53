"""A client of WS /v1/live for the tests: settings and drawings in, pictures out, each with its header."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from running_server import PATIENCE_S, Running, image_file, read_image
from websockets.sync.client import ClientConnection, connect

from engines.types import Pixels


@dataclass(frozen=True)
class LiveImage:
    header: dict[str, Any]
    content: bytes

    @property
    def sequence(self) -> int:
        number: int = self.header["sequence"]
        return number

    @property
    def pixels(self) -> Pixels:
        return read_image(self.content)


class LiveClient:
    """Counts what it sends, as the server counts what it gets."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.sequence = 0
        self.ready = self.expect_message("ready")

    def set(self, **settings: Any) -> int:
        return self.send(json.dumps(settings))

    def draw(self, drawing: Pixels | bytes) -> int:
        return self.send(drawing if isinstance(drawing, bytes) else image_file(drawing))

    def send(self, message: str | bytes) -> int:
        self.socket.send(message)
        self.sequence += 1
        return self.sequence

    def next_message(self) -> dict[str, Any]:
        """The next text message."""
        text = self.socket.recv(PATIENCE_S)
        assert isinstance(text, str), "a binary message without its header"
        told: dict[str, Any] = json.loads(text)
        return told

    def expect_message(self, kind: str) -> dict[str, Any]:
        told = self.next_message()
        assert told.pop("type") == kind, told
        return told

    def image(self) -> LiveImage:
        header = self.expect_message("picture")
        content = self.socket.recv(PATIENCE_S)
        assert isinstance(content, bytes)
        assert len(content) == header["bytes"]
        return LiveImage(header, content)

    def picture_of(self, sequence: int) -> LiveImage:
        """The first picture that shows the message of that number, or a newer one."""
        while (shown := self.image()).sequence < sequence:
            pass
        return shown


@contextmanager
def live(running: Running, **options: Any) -> Iterator[LiveClient]:
    """A session, from its greeting to the end of the block."""
    url = running.url.replace("http", "ws") + "/v1/live"
    with connect(url, open_timeout=PATIENCE_S, proxy=None, **options) as socket:
        yield LiveClient(socket)
