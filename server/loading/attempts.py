"""Records failed builds beside the engines, so that restarts do not repeat them endlessly."""

import contextlib
import json
from pathlib import Path

MAX_ATTEMPTS = 3  # builds that were killed or found the disk full


class BuildAttempts:
    """The record of one engine folder, valid for one `key`: the engine to build and the versions that build it."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def refusal(self) -> str | None:
        """Returns why no further build may start, or None if one may."""
        count, reason = self._read()
        if reason is not None:
            return f"an earlier build failed: {reason}; to try again remove {self._path}"
        if count >= MAX_ATTEMPTS:
            return f"{count} builds were killed or found no room; to try again remove {self._path}"
        return None

    def start(self) -> None:
        """Counts a build that starts."""
        count, _ = self._read()
        self._write(count + 1, None)

    def failed(self, reason: str) -> None:
        """Records a failure that would repeat."""
        count, _ = self._read()
        self._write(count, reason)

    def cancel(self) -> None:
        """Uncounts a build that the server ended itself."""
        count, _ = self._read()
        self._write(count - 1, None)

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[int, str | None]:
        try:
            record = json.loads(self._path.read_bytes())
            return (int(record["count"]), record["reason"]) if record["key"] == self._key else (0, None)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None

    def _write(self, count: int, reason: str | None) -> None:
        # On a full disk the attempt is not counted, and the build may be repeated.
        with contextlib.suppress(OSError):
            self._path.write_text(json.dumps({"key": self._key, "count": count, "reason": reason}))
