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

    def of(self, wanted: Mapping[str, str], open_engine: Callable[[str], Engine]) -> str:
        """The fastest vendor of `wanted`, which says in words what each engine is. With one there is no question."""
        if len(wanted) == 1:
            return next(iter(wanted))
        key = json.dumps(sorted(wanted.items()))
        kept = self._kept()
        if key not in kept:
            kept[key] = {vendor: _measured(vendor, open_engine) for vendor in wanted}
            with contextlib.suppress(OSError):  # measured again at the next start
                self._path.write_text(json.dumps(kept))
        self._seconds = kept[key]
        return min(wanted, key=lambda vendor: self._seconds.get(vendor, float("inf")))

    def reason(self, vendor: str) -> str:
        """Why it was chosen."""
        if vendor not in self._seconds:
            return "the engine that fits"
        told = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in sorted(self._seconds.items()))
        return f"the fastest for one image: {told}"

    def _kept(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _measured(vendor: str, open_engine: Callable[[str], Engine]) -> float:
    """Median seconds of one image in one step, of a new prompt each; infinite where the engine cannot be opened."""
    try:
        engine = open_engine(vendor)
        engine.warmup()
        width, height = engine.limits.default_size
        seconds = []
        for run in range(RUNS):
            began = time.perf_counter()
            engine.generate([Job(f"a red circle {run}", run, width, height, engine.limits.steps[0])])
            seconds.append(time.perf_counter() - began)
        engine.close()
    except SprintError as error:
        logger.error("engine: %s: %s", vendor, error)
        return float("inf")
    return statistics.median(seconds)
