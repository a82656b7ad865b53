"""Log lines as text or as JSON objects. They hold request and trace ids, sizes and times, and never a prompt."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, its `fields`, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as time, level, message and its `fields` as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class RateLimitedLog:
    """Logs at most one warning per `every_s` seconds, with the number of suppressed ones."""

    def __init__(self, logger: logging.Logger, every_s: float = 1.0) -> None:
        self._logger = logger
        self._every_s = every_s
        self._last = -every_s
        self._suppressed = 0

    def warning(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._last < self._every_s:
            self._suppressed += 1
            return
        self._logger.warning(message + "; %d such lines left out", *arguments, self._suppressed)
        self._last, self._suppressed = now, 0


def configure(log_format: str, level: str, fields: Mapping[str, object] | None = None) -> None:
    """Sends all logs to stderr in one format; adds `fields` to each line."""

    def add(record: logging.LogRecord) -> bool:
        record.fields = {**(fields or {}), **getattr(record, "fields", {})}
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(add)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
