"""Which of several vendors' engines is the fastest here: measured once, kept beside the engines."""

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engines.errors import SprintError
from engines.types import Engine, Job

RUNS = 5

logger = logging.getLogger("server.build")


class Fastest:
    """The measurements of one folder of engines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}

    def of(self, requirements: Mapping[str, str], open_engine: Callable[[str], Engine]) -> tuple[str, Engine | None]:
        """Returns the fastest vendor, and its engine if the measurement left it open.

        requirements: vendor -> text that identifies its engine. Measures only two vendors or more.
        """
        if len(requirements) == 1:
            return next(iter(requirements)), None
        key = json.dumps(sorted(requirements.items()))
        cached = self._cached()
        last: Engine | None = None
        if key not in cached:
            cached[key] = {}
            for vendor in requirements:
                if last is not None:  # one engine at a time has room on a GPU
                    last.close()
                last, cached[key][vendor] = _measured(vendor, open_engine)
            with contextlib.suppress(OSError):  # measured again at the next start
                self._path.write_text(json.dumps(cached))
        self._seconds = cached[key]
        fastest = min(requirements, key=lambda vendor: self._seconds.get(vendor, float("inf")))
        if last is not None and fastest != vendor:
            last.close()
            last = None
        return fastest, last

    def reason(self, vendor: str) -> str:
        """Why it was chosen."""
        if vendor not in self._seconds:
            return "the engine that fits"
        told = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in sorted(self._seconds.items()))
        return f"the fastest for one image: {told}"

    def _cached(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _measured(vendor: str, open_engine: Callable[[str], Engine]) -> tuple[Engine | None, float]:
    """Returns the open engine and the median seconds of one image in one step, of a new prompt each.

    None and infinity if the engine fails.
    """
    try:
        engine = open_engine(vendor)
        engine.warmup()
        width, height = engine.limits.default_size
        seconds = []
        for run in range(RUNS):
            began = time.perf_counter()
            engine.generate([Job(f"a red circle {run}", run, width, height, engine.limits.steps[0])])
            seconds.append(time.perf_counter() - began)
    except SprintError as error:
        logger.error("engine: %s: %s", vendor, error)
        return None, float("inf")
    return engine, statistics.median(seconds)
