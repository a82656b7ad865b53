"""Chooses the fastest of several vendors' engines. Measures once and keeps the result beside the engines."""

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


class FastestVendor:
    """The measurements of one engine folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}

    def choose(self, engines: Mapping[str, str], open_engine: Callable[[str], Engine]) -> tuple[str, Engine | None]:
        """Returns the fastest vendor of `engines` (vendor -> description), and its engine if it is open.

        Measures nothing if there is only one.
        """
        if len(engines) == 1:
            return next(iter(engines)), None
        key = json.dumps(sorted(engines.items()))
        cached = self._cached()
        last: Engine | None = None
        if key not in cached:
            cached[key] = {}
            for vendor in engines:
                if last is not None:  # a GPU has room for one engine
                    last.close()
                last, cached[key][vendor] = _measure(vendor, open_engine)
            with contextlib.suppress(OSError):  # a full disk: measures again at the next start
                self._path.write_text(json.dumps(cached))
        self._seconds = cached[key]
        fastest = min(engines, key=lambda vendor: self._seconds.get(vendor, float("inf")))
        if last is not None and fastest != vendor:
            last.close()
            last = None
        return fastest, last

    def reason(self, vendor: str) -> str:
        """Returns why `choose` took this vendor."""
        if vendor not in self._seconds:
            return "the engine that fits"
        figures = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in sorted(self._seconds.items()))
        return f"the fastest for one image: {figures}"

    def _cached(self) -> dict[str, dict[str, float]]:
        try:
            cached = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return cached if isinstance(cached, dict) else {}


def _measure(vendor: str, open_engine: Callable[[str], Engine]) -> tuple[Engine | None, float]:
    """Returns the open engine and the median seconds of one-step images, each of a new prompt.

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
