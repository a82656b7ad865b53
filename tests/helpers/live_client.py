"""A client of WS /v1/live for the tests: sends settings and drawings, receives images with their headers."""

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
    """A live session. `sequence` counts sent messages as the server does."""

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
        """Returns the next text message."""
        text = self.socket.recv(PATIENCE_S)
        assert isinstance(text, str), "a binary message without its header"
        message: dict[str, Any] = json.loads(text)
        return message

    def expect_message(self, kind: str) -> dict[str, Any]:
        message = self.next_message()
        assert message.pop("type") == kind, message
        return message

    def image(self) -> LiveImage:
        header = self.expect_message("picture")
        content = self.socket.recv(PATIENCE_S)
        assert isinstance(content, bytes)
        assert len(content) == header["bytes"]
        return LiveImage(header, content)

    def image_of(self, sequence: int) -> LiveImage:
        """Returns the first image of the message of that number, or of a newer one."""
        while (received := self.image()).sequence < sequence:
            pass
        return received


@contextmanager
def live(running: Running, **options: Any) -> Iterator[LiveClient]:
    """Opens a session for the block."""
    url = running.url.replace("http", "ws") + "/v1/live"
    with connect(url, open_timeout=PATIENCE_S, proxy=None, **options) as socket:
        yield LiveClient(socket)
