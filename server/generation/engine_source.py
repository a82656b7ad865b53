"""Sources of the engine that serves, and the progress of a build."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engines.types import Engine


@dataclass(frozen=True, slots=True)
class Building:
    """Progress of an engine build: the current step, percent done, and seconds left (None while unknown)."""

    module: str
    percent: float
    seconds_left: float | None

    def to_dict(self) -> dict[str, object]:
        left = None if self.seconds_left is None else round(self.seconds_left)
        return {"module": self.module, "percent": round(self.percent), "seconds_left": left}

    @property
    def summary(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        return f"{self.module}, {self.percent:.0f} %{left}"


@runtime_checkable
class EngineSource(Protocol):
    """Called from the engine's thread, except `building` and `close`, which any thread may call."""

    def load(self, wake: Callable[[], None]) -> Engine:
        """Returns the first engine. `wake` is called, from any thread, once `replacement` has another."""

    def replacement(self) -> Engine | None:
        """Returns a better, warm engine once; the caller closes the previous one."""

    def building(self) -> Building | None: ...

    def close(self) -> None:
        """Ends a build in progress."""


class FixedEngineSource:
    """Loads one engine and never replaces it."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load

    def load(self, wake: Callable[[], None]) -> Engine:  # noqa: ARG002 - never another engine
        return self._load()

    def replacement(self) -> Engine | None:
        return None

    def building(self) -> Building | None:
        return None

    def close(self) -> None:
        """Does nothing."""
