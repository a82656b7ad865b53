"""Log lines, as text or as one JSON object each. They carry request and trace ids, sizes and times; never a prompt."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the record's `fields`, a traceback where there is one."""

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
    """Time, level, message, then the record's `fields` as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class Seldom:
    """Warnings of one kind: at most one in `every_s`, which says how many were left out before it."""

    def __init__(self, logger: logging.Logger, every_s: float = 1.0) -> None:
        self._logger = logger
        self._every_s = every_s
        self._last = -every_s
        self._left_out = 0

    def warning(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._last < self._every_s:
            self._left_out += 1
            return
        self._logger.warning(message + "; %d such lines left out", *arguments, self._left_out)
        self._last, self._left_out = now, 0


def configure(log_format: str, level: str, fields: Mapping[str, object] | None = None) -> None:
    """Sends everything that is logged to stderr, in one format; each line carries `fields`."""

    def add(record: logging.LogRecord) -> bool:
        record.fields = {**(fields or {}), **getattr(record, "fields", {})}
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(add)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
