"""The engines of several checkpoints, one engine to the scheduler. One thread calls them, one after the other.

A job names its model; jobs of different models have different batch keys, so a batch runs on one engine.
"""

from collections.abc import Mapping, Sequence

from engines.errors import JobError
from engines.types import Deliver, Engine, EngineInfo, Job, Limits, RawImage, ReportsMemory
from server.errors import FieldError, InvalidError

MAX_SHOWN = 80  # characters of an unknown name in an error message


class ModelEngines:
    """Implements engines.types.Engine. The first engine is the default: `info` and `limits` are its own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """engines: name of the model -> its engine, at least one."""
        self._engines = dict(engines)
        self._first = next(iter(self._engines.values()))
        self._owned = list(self._engines.values())

    @property
    def engines(self) -> Mapping[str, Engine]:
        return self._engines

    @property
    def info(self) -> EngineInfo:
        return self._first.info

    @property
    def limits(self) -> Limits:
        return self._first.limits

    def warmup(self) -> None:
        for engine in self._engines.values():
            engine.warmup()

    def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
        """Runs the jobs on the engine of their model; an empty name is the first one. Raises as that engine."""
        name = jobs[0].model if jobs else ""
        engine = self._engines.get(name) if name else self._first
        if engine is None:
            raise JobError(f"model: got {name!r}, allowed: {', '.join(self._engines)}")
        return engine.generate(jobs, deliver)

    def memory_bytes(self) -> Mapping[str, int]:
        """See engines.types.ReportsMemory; the engines share one device and one allocator."""
        return self._first.memory_bytes() if isinstance(self._first, ReportsMemory) else {}

    def with_replaced(self, better: Mapping[str, Engine]) -> "ModelEngines":
        """Returns these engines with others for some models. `close` of this object then ends the replaced ones."""
        self._owned = [self._engines[name] for name in better]
        return ModelEngines({**self._engines, **better})

    def close(self) -> None:
        for engine in self._owned:
            engine.close()


def engines_by_name(engine: Engine) -> Mapping[str, Engine]:
    """Returns name -> engine of every model that is served, the default first."""
    return engine.engines if isinstance(engine, ModelEngines) else {engine.info.checkpoint: engine}


def chosen_model(engine: Engine, requested: str | None) -> tuple[str, Engine]:
    """Returns Job.model and the engine of a request; None requests the default.

    The name is empty if only one model is served. Raises InvalidError (422) for an unknown name.
    """
    if requested is None and not isinstance(engine, ModelEngines):
        return "", engine
    engines = engines_by_name(engine)
    name = next(iter(engines)) if requested is None else requested
    if name not in engines:
        got = repr(name) if len(name) <= MAX_SHOWN else f"{len(name)} characters"
        raise InvalidError([FieldError("model", f"model: got {got}, allowed: {', '.join(engines)}")])
    return (name if isinstance(engine, ModelEngines) else ""), engines[name]
