"""--engine auto: the engines that fit are served; what is absent is built first, once on a volume; else PyTorch serves.

Looking, loading and building come from outside (`Ways`), so that this file knows the order of things alone.
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
from server.loading.attempts import Attempts
from server.loading.build_lock import build_lock
from server.loading.build_process import BuildProcess
from server.loading.fastest import FastestVendor

PAUSE_S = 0.5  # between two looks at a lock that another process holds

logger = logging.getLogger("server.build")


class Candidate(Protocol):
    """engines.artifacts.candidates.Candidate, as far as it is used here."""

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
class Offers:
    """What could serve: a candidate for each vendor; `why_none` where there is none."""

    each: Sequence[Candidate]
    why_none: str = ""


@dataclass(frozen=True)
class Ways:
    """How it is done. `find`: the fitting engines of a candidate but for some, and why others do not fit. `plain`:
    PyTorch's engine; True limits it to what the built one will run. `builder`: the command before its arguments."""

    look: Callable[[], Offers]
    find: Callable[[Candidate, Collection[Path]], tuple[Path | None, list[str]]]
    built: Callable[[Path], Engine]
    plain: Callable[[bool], Engine]
    builder: Sequence[str]


class AutomaticEngine:
    """An EngineSource over a folder of engines. `while_building`: serve from PyTorch until the engine is there."""

    def __init__(self, folder: Path, ways: Ways, *, while_building: bool = False) -> None:
        self._folder = folder
        self._ways = ways
        self._while_building = while_building
        self._fastest = FastestVendor(folder / ".fastest.json")
        self._unfit: set[Path] = set()  # engines that fitted by their manifest and could not be opened
        self._building: Building | None = None
        self._next: SimpleQueue[Engine] = SimpleQueue()
        self._ended = threading.Event()
        self._process: BuildProcess | None = None

    # --- EngineSource -----------------------------------------------------------------------------------------------

    def load(self, wake: Callable[[], None]) -> Engine:
        offers = self._ways.look()
        if not offers.each:
            return self._plain(offers.why_none, logging.INFO)
        absent = [one.vendor for one in offers.each if self._ways.find(one, ())[0] is None]
        if absent and self._while_building:
            why = f"until the engine of {', '.join(absent)} is built"
            engine = self._plain(why, logging.INFO, narrow=True)
            threading.Thread(target=self._replace, args=(offers, engine, wake), name="builder", daemon=True).start()
            return engine
        try:
            return self._best(offers)
        except BuildFailedError as error:
            return self._plain(str(error), logging.WARNING)

    def replacement(self) -> Engine | None:
        with contextlib.suppress(Empty):
            return self._next.get_nowait()
        return None

    def building(self) -> Building | None:
        return self._building

    def close(self) -> None:
        self._ended.set()
        if self._process is not None:
            self._process.stop()

    # --- the order of things ----------------------------------------------------------------------------------------

    def _plain(self, why: str, level: int, *, narrow: bool = False) -> Engine:
        engine = self._ways.plain(narrow)
        if why:
            logger.log(level, "engine: PyTorch serves: %s", why)
            engine.info.reasons["engine"] = f"PyTorch: {why}"
        return engine

    def _replace(self, offers: Offers, serving: Engine, wake: Callable[[], None]) -> None:
        """On a thread of its own, beside the one that serves."""
        try:
            engine = self._best(offers)
            engine.warmup()
        except Exception as error:  # what serves goes on serving
            expected = isinstance(error, SprintError)
            logger.error("engine: PyTorch goes on: %s", error, exc_info=None if expected else error)
            serving.info.reasons["engine"] = f"PyTorch: {error}"
            return
        self._next.put(engine)
        wake()

    def _best(self, offers: Offers) -> Engine:
        """The engine of the fastest vendor; what is absent is built. Raises BuildFailedError where none comes of it."""
        paths: dict[str, Path] = {}
        failures = []
        for one in offers.each:
            try:
                paths[one.vendor] = self._have(one)
            except BuildFailedError as error:
                logger.error("engine: %s: %s", one.vendor, error)
                failures.append(f"{one.vendor}: {error}")
        there = {one.vendor: one for one in offers.each if one.vendor in paths}
        while there:
            vendor, engine = self._fastest.choose(
                {name: repr(one.requirements) for name, one in there.items()},
                lambda name: self._open(there[name], paths[name]),
            )
            try:
                engine = engine or self._open(there[vendor], paths[vendor])
            except SprintError as error:
                logger.error("engine: %s: %s", vendor, error)
                failures.append(f"{vendor}: {error}")
                del there[vendor]
                continue
            engine.info.reasons["engine"] = f"{vendor}: {self._fastest.reason(vendor)} ({paths[vendor]})"
            return engine
        raise BuildFailedError("; ".join(failures), again=False)

    def _open(self, candidate: Candidate, path: Path) -> Engine:
        """Opens built engines; those that are damaged are built again, once."""
        try:
            return self._ways.built(path)
        except (ArtifactError, ParityError) as error:
            logger.warning("engine: %s", error)
            self._unfit.add(path)
            return self._ways.built(self._have(candidate))

    def _have(self, candidate: Candidate) -> Path:
        """The folder of engines that fit; built where there is none. Raises BuildFailedError."""
        path, others = self._ways.find(candidate, self._unfit)
        if path is not None:
            return path
        for line in others:
            logger.info("engine: does not fit: %s", line)
        if candidate.missing:
            names = ", ".join(candidate.missing)
            raise BuildFailedError(
                f"not built here, without {names}; install them, or run {candidate.command}", again=True
            )
        try:
            with build_lock(self._folder / f".{candidate.name}.lock", self._wait) as lock:
                path, _ = self._ways.find(candidate, self._unfit)  # another process may have built it meanwhile
                return path or self._build(candidate, lock.descriptor, lock.tell)
        except OSError as error:
            raise BuildFailedError(f"{self._folder}: {error.strerror or error}", again=True) from error
        finally:
            self._building = None

    def _build(self, candidate: Candidate, lock: int, tell: Callable[[Building], None]) -> Path:
        out = self._folder / candidate.name
        identity = f"{candidate.requirements!r} {__version__}"
        attempts = Attempts(self._folder / f".{candidate.name}.attempts.json", identity)
        if (why := attempts.why_not_again()) is not None:
            raise BuildFailedError(why, again=False)

        def told(building: Building) -> None:
            self._building = building
            tell(building)
            logger.info("building for %s: %s", candidate.vendor, building.words)

        for abandoned in self._folder.glob(f".{escape(candidate.name)}.building-*"):  # whoever held the lock is gone
            shutil.rmtree(abandoned, ignore_errors=True)
        told(Building(f"start of the build for {candidate.vendor}", 0, None))
        attempts.begin()
        self._process = BuildProcess([*self._ways.builder, *candidate.arguments, "--out", str(out)], told)
        if self._ended.is_set():
            self._process.stop()
        try:
            self._process.run(keep=[lock])
        except BuildFailedError as error:
            if self._ended.is_set():
                attempts.forgive()
            elif not error.again:
                attempts.failed(str(error))
            raise
        attempts.clear()
        self._unfit.discard(out)
        path, others = self._ways.find(candidate, self._unfit)
        if path is None:
            reason = f"what was built does not fit: {'; '.join(others) or out}"
            attempts.failed(reason)
            raise BuildFailedError(reason, again=False)
        logger.info("built for %s: %s", candidate.vendor, path)
        return path

    def _wait(self, theirs: Building | None) -> None:
        """While another process builds."""
        step = "start" if theirs is None else theirs.module
        percent, left = (0.0, None) if theirs is None else (theirs.percent, theirs.seconds_left)
        self._building = Building(f"another process builds: {step}", percent, left)
        if self._ended.wait(PAUSE_S):
            raise BuildFailedError("the server is shutting down", again=True)
