"""API keys from a file: one per line, plain or `sha256:<64 hex digits>`; blank lines and # comments are skipped.

The file is UTF-8, or UTF-16 with a byte order mark; byte order marks are never part of a key. A changed file is
reloaded. If it has become unreadable or empty, the last keys stay valid and the log says so. Memory holds only digests;
a comparison takes the same time for every key.
"""

import base64
import codecs
import hashlib
import hmac
import logging
import re
import time
from pathlib import Path

from server.errors import SettingsError, UnauthorizedError

CHECK_EVERY_S = 1.0  # seconds between two looks at the file's time stamp, at least

logger = logging.getLogger("server.http")


class ApiKeys:
    """The keys of one file. Raises SettingsError if the file cannot be read or holds no key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._digests = read_digests(path)
        self._checked = time.monotonic()

    def check(self, authorization: str | None, *, basic: bool = False) -> None:
        """Raises UnauthorizedError (401) unless the Authorization header is `Bearer` with one of the keys.

        `basic` also accepts `Basic` with any user name and a key as password.
        """
        self._reload_if_changed()
        scheme, _, key = (authorization or "").partition(" ")
        if basic and scheme.lower() == "basic":
            scheme, key = "bearer", basic_password(key)
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("this server needs an API key: send the header `Authorization: Bearer <key>`")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        if not any(matches):
            raise UnauthorizedError("the API key is not one of this server's")

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = read_digests(self._path)
        except SettingsError as error:
            logger.error("keeping the API keys read before: %s", error)
        else:
            logger.info("API keys read again: %d", len(self._digests))

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None  # read_digests raises the error
        return status.st_mtime_ns, status.st_size, status.st_ino


def basic_password(credentials: str) -> str:
    """Returns the password of Basic's base64 of user:password, or "" for other text."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def read_digests(path: Path) -> tuple[bytes, ...]:
    """Returns the SHA-256 of each key. Raises SettingsError, whose message holds no text of a key."""
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {path}: cannot be read: {error}") from error
    digests = []
    for number, raw in enumerate(lines, start=1):
        line = raw.strip().lstrip("\ufeff").lstrip()  # concatenated files have marks inside
        if not line or line.startswith("#"):
            continue
        if not line.startswith("sha256:"):
            digests.append(hashlib.sha256(line.encode()).digest())
        elif re.fullmatch(r"[0-9a-fA-F]{64}", line.removeprefix("sha256:")):
            digests.append(bytes.fromhex(line.removeprefix("sha256:")))
        else:
            raise SettingsError(f"--api-key-file {path}, line {number}: after sha256: must come 64 hex digits")
    if not digests:
        raise SettingsError(f"--api-key-file {path}: holds no key; one a line, plain or sha256:<64 hex digits>")
    return tuple(digests)


def decode_text(content: bytes) -> str:
    """Decodes a file by its byte order mark, as UTF-8 without one. Raises UnicodeDecodeError."""
    if len(content) > 2 and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")
