"""What became of builds that gave no engine, kept beside the engines, so that restarts do not repeat them for ever."""

import contextlib
import json
from pathlib import Path

MOST = 3  # builds that were killed or found the disk full


class Attempts:
    """The record of one folder of engines. It holds for one `key`: what is built, by which versions."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def why_not_again(self) -> str | None:
        """Why no other build shall begin; None where one may."""
        count, reason = self._read()
        if reason is not None:
            return f"an earlier build failed: {reason}; to try again remove {self._path}"
        if count >= MOST:
            return f"{count} builds were killed or found no room; to try again remove {self._path}"
        return None

    def begin(self) -> None:
        count, _ = self._read()
        self._write(count + 1, None)

    def failed(self, reason: str) -> None:
        """A failure that would repeat."""
        count, _ = self._read()
        self._write(count, reason)

    def forgive(self) -> None:
        """The build that began was ended on purpose, and does not count."""
        count, _ = self._read()
        self._write(count - 1, None)

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[int, str | None]:
        try:
            found = json.loads(self._path.read_bytes())
            return (int(found["count"]), found["reason"]) if found["key"] == self._key else (0, None)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None

    def _write(self, count: int, reason: str | None) -> None:
        # A disk that is full costs no more than a build that may be tried again.
        with contextlib.suppress(OSError):
            self._path.write_text(json.dumps({"key": self._key, "count": count, "reason": reason}))
