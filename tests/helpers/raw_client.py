"""Sends bytes to a server over a socket, and reads its responses."""

import http.client
import socket
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from running_server import PATIENCE_S


@dataclass(frozen=True)
class RawResponse:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Raw:
    """One connection to the server at `url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *lines: str, body: bytes = b"") -> None:
        """Sends a head of these lines and a Host header, and a body."""
        head = "\r\n".join([lines[0], "host: x", *lines[1:], "", ""])
        self.socket.sendall(head.encode() + body)

    def read_response(self, method: str = "POST") -> RawResponse:
        """Reads the next response on the connection."""
        response = http.client.HTTPResponse(self.socket, method=method)
        response.begin()
        return RawResponse(response.status, response.headers, response.read())

    def closed(self) -> bool:
        """Waits for data or the end of the connection, and returns True at its end."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
