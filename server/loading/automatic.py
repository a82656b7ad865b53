"""--engine auto: serves a built engine that fits, builds a missing one first, or serves PyTorch's engine.

`EngineOperations` finds, builds and loads engines; this file decides the order.
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from engines.errors import ArtifactError, ParityError, SprintError
from engines.types import Engine
from server import __version__
from server.errors import BuildFailedError
from server.generation.engine_source import Building
from server.loading.attempts import BuildAttempts
from server.loading.build_lock import build_lock
from server.loading.build_process import BuildProcess
from server.loading.fastest import FastestVendor

PAUSE_S = 0.5  # between attempts at a lock that another process holds

logger = logging.getLogger("server.build")


class Candidate(Protocol):
    """The part of engines.artifacts.candidates.Candidate that this file uses."""

    @property
    def vendor(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def requirements(self) -> object: ...
    @property
    def arguments(self) -> tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    @property
    def command(self) -> str: ...


@dataclass(frozen=True)
class Candidates:
    """The engines that could serve, one for each vendor; `why_none` if there is none."""

    each: Sequence[Candidate]
    why_none: str = ""


class EngineOperations(Protocol):
    """Operations on the engines of one server's settings, in one folder."""

    @property
    def folder(self) -> Path: ...
    @property
    def build_command(self) -> Sequence[str]:
        """The builder's command without its arguments."""

    def find_candidates(self) -> Candidates: ...
    def find_built(self, candidate: Candidate, exclude: Collection[Path]) -> tuple[Path | None, list[str]]:
        """Returns a folder of fitting engines that is not in `exclude`, and why others do not fit."""

    def open_built(self, path: Path) -> Engine: ...
    def load_pytorch(self, built_sizes_only: bool) -> Engine: ...


class AutomaticEngine:
    """An EngineSource over a folder of engines. `while_building`: PyTorch serves until the engine is built."""

    def __init__(self, operations: EngineOperations, *, while_building: bool = False) -> None:
        self._folder = operations.folder
        self._operations = operations
        self._while_building = while_building
        self._fastest = FastestVendor(self._folder / ".fastest.json")
        self._unfit: set[Path] = set()  # engines whose manifest fits but that did not open
        self._building: Building | None = None
        self._replacements: SimpleQueue[Engine] = SimpleQueue()
        self._closed = threading.Event()
        self._process: BuildProcess | None = None

    # --- EngineSource -----------------------------------------------------------------------------------------------

    def load(self, wake: Callable[[], None]) -> Engine:
        candidates = self._operations.find_candidates()
        if not candidates.each:
            return self._load_pytorch(candidates.why_none, logging.INFO)
        buildable = [one for one in candidates.each if not one.missing]
        absent = [one.vendor for one in buildable if self._operations.find_built(one, ())[0] is None]
        if absent and self._while_building:
            why = f"until the engine of {', '.join(absent)} is built"
            engine = self._load_pytorch(why, logging.INFO, built_sizes_only=True)
            arguments = (candidates, engine, wake)
            threading.Thread(target=self._replace, args=arguments, name="builder", daemon=True).start()
            return engine
        try:
            return self._open_fastest(candidates)
        except BuildFailedError as error:
            return self._load_pytorch(str(error), logging.WARNING)

    def replacement(self) -> Engine | None:
        with contextlib.suppress(Empty):
            return self._replacements.get_nowait()
        return None

    def building(self) -> Building | None:
        return self._building

    def close(self) -> None:
        self._closed.set()
        if self._process is not None:
            self._process.stop()

    # --- decisions ----------------------------------------------------------------------------------------

    def _load_pytorch(self, why: str, level: int, *, built_sizes_only: bool = False) -> Engine:
        engine = self._operations.load_pytorch(built_sizes_only)
        if why:
            logger.log(level, "engine: PyTorch serves: %s", why)
            engine.info.reasons["engine"] = f"PyTorch: {why}"
        return engine

    def _replace(self, candidates: Candidates, serving: Engine, wake: Callable[[], None]) -> None:
        """Runs on a thread of its own while `serving` serves."""
        try:
            engine = self._open_fastest(candidates)
            engine.warmup()
        except Exception as error:  # `serving` goes on
            expected = isinstance(error, SprintError)
            logger.error("engine: PyTorch goes on: %s", error, exc_info=None if expected else error)
            serving.info.reasons["engine"] = f"PyTorch: {error}"
            return
        self._replacements.put(engine)
        wake()

    def _open_fastest(self, candidates: Candidates) -> Engine:
        """Opens the fastest vendor's engine; builds missing ones first. Raises BuildFailedError if none opens."""
        paths: dict[str, Path] = {}
        failures = []
        for candidate in candidates.each:
            try:
                paths[candidate.vendor] = self._find_or_build(candidate)
            except BuildFailedError as error:
                logger.error("engine: %s: %s", candidate.vendor, error)
                failures.append(f"{candidate.vendor}: {error}")
        available = {one.vendor: one for one in candidates.each if one.vendor in paths}
        while available:
            vendor, engine = self._fastest.choose(
                {name: repr(one.requirements) for name, one in available.items()},
                lambda name: self._open(available[name], paths[name]),
            )
            try:
                engine = engine or self._open(available[vendor], paths[vendor])
            except SprintError as error:
                logger.error("engine: %s: %s", vendor, error)
                failures.append(f"{vendor}: {error}")
                del available[vendor]
                continue
            engine.info.reasons["engine"] = f"{vendor}: {self._fastest.reason(vendor)} ({paths[vendor]})"
            return engine
        raise BuildFailedError("; ".join(failures), retryable=False)

    def _open(self, candidate: Candidate, path: Path) -> Engine:
        """Opens built engines; rebuilds damaged ones once."""
        try:
            return self._operations.open_built(path)
        except (ArtifactError, ParityError) as error:
            logger.warning("engine: %s", error)
            self._unfit.add(path)
            return self._operations.open_built(self._find_or_build(candidate))

    def _find_or_build(self, candidate: Candidate) -> Path:
        """Returns a folder of engines that fit; builds one if there is none. Raises BuildFailedError."""
        path, others = self._operations.find_built(candidate, self._unfit)
        if path is not None:
            return path
        for line in others:
            logger.info("engine: does not fit: %s", line)
        if candidate.missing:
            names = ", ".join(candidate.missing)
            raise BuildFailedError(
                f"not built here, without {names}; install them, or run {candidate.command}", retryable=True
            )
        try:
            with build_lock(self._folder / f".{candidate.name}.lock", self._wait) as lock:
                path, _ = self._operations.find_built(
                    candidate, self._unfit
                )  # another process may have built it meanwhile
                return path or self._build(candidate, lock.descriptor, lock.write_progress)
        except OSError as error:
            raise BuildFailedError(f"{self._folder}: {error.strerror or error}", retryable=True) from error
        finally:
            self._building = None

    def _build(self, candidate: Candidate, lock: int, write_progress: Callable[[Building], None]) -> Path:
        out = self._folder / candidate.name
        attempts = BuildAttempts(
            self._folder / f".{candidate.name}.attempts.json", f"{candidate.requirements!r} {__version__}"
        )
        if (why := attempts.refusal()) is not None:
            raise BuildFailedError(why, retryable=False)

        def on_progress(building: Building) -> None:
            self._building = building
            write_progress(building)
            logger.info("building for %s: %s", candidate.vendor, building.summary)

        for abandoned in self._folder.glob(f".{escape(candidate.name)}.building-*"):  # of a builder that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        on_progress(Building(f"start of the build for {candidate.vendor}", 0, None))
        attempts.start()
        self._process = BuildProcess(
            [*self._operations.build_command, *candidate.arguments, "--out", str(out)], on_progress
        )
        if self._closed.is_set():
            self._process.stop()
        try:
            self._process.run(keep=[lock])
        except BuildFailedError as error:
            if self._closed.is_set():
                attempts.cancel()
            elif not error.retryable:
                attempts.failed(str(error))
            raise
        attempts.clear()
        self._unfit.discard(out)
        path, others = self._operations.find_built(candidate, self._unfit)
        if path is None:
            reason = f"what was built does not fit: {'; '.join(others) or out}"
            attempts.failed(reason)
            raise BuildFailedError(reason, retryable=False)
        logger.info("built for %s: %s", candidate.vendor, path)
        return path

    def _wait(self, progress: Building | None) -> None:
        """Pauses while another process builds, and shows its progress."""
        step = "start" if progress is None else progress.module
        percent, left = (0.0, None) if progress is None else (progress.percent, progress.seconds_left)
        self._building = Building(f"another process builds: {step}", percent, left)
        if self._closed.wait(PAUSE_S):
            raise BuildFailedError("the server is shutting down", retryable=True)
