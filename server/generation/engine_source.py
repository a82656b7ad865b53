"""Where the engine's thread gets its engine from, and what is told until it is there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engines.types import Engine


@dataclass(frozen=True, slots=True)
class Building:
    """An engine that is being built: the step under way, and how far it is. `seconds_left`: None while unknown."""

    module: str
    percent: float
    seconds_left: float | None

    def to_dict(self) -> dict[str, object]:
        left = None if self.seconds_left is None else round(self.seconds_left)
        return {"module": self.module, "percent": round(self.percent), "seconds_left": left}

    @property
    def words(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        return f"{self.module}, {self.percent:.0f} %{left}"


@runtime_checkable
class EngineSource(Protocol):
    """Called from the engine's thread, but for `building` and `close`, which any thread may call."""

    def load(self, wake: Callable[[], None]) -> Engine:
        """An engine. `wake`: called, from any thread, when `replacement` has another."""

    def replacement(self) -> Engine | None:
        """A better engine, warm, once; whoever takes it closes the one before."""

    def building(self) -> Building | None: ...

    def close(self) -> None:
        """Ends a build that is under way."""


class FixedEngineSource:
    """An engine, or what loads one: nothing is built."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load

    def load(self, wake: Callable[[], None]) -> Engine:  # noqa: ARG002 - never another engine
        return self._load()

    def replacement(self) -> Engine | None:
        return None

    def building(self) -> Building | None:
        return None

    def close(self) -> None:
        """Nothing is under way."""
