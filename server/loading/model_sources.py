"""Several models: the settings of each, and the EngineSource that loads one engine for each.

An option holds for every model, but an engine's folder and adapters belong to one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from engines.types import AdapterOption, Engine
from server.errors import SettingsError
from server.generation.engine_source import Building, EngineSource
from server.generation.model_engines import ModelEngines
from server.settings import BUILT_BACKENDS, ModelOption, Settings

FOR_ALL = ("auto", "none")  # values of --engine that need no model's name


def settings_by_model(settings: Settings) -> dict[str, Settings]:
    """Returns name -> settings of a server with this model alone, in the order of --model.

    Raises SettingsError for an engine or an adapter of no model, or one that does not say of which.
    """
    names = [model.name for model in settings.models]
    engines = _engines(settings, names)
    adapters = {name: list[AdapterOption]() for name in names}
    for adapter in settings.lora:
        name = _owner("--lora", str(adapter), adapter.model, names, f"MODEL:{adapter}")
        adapters[name].append(adapter._replace(model=""))
    return {
        model.name: replace(settings, model=_text(model), engine=engines[model.name], lora=tuple(adapters[model.name]))
        for model in settings.models
    }


class ModelSources:
    """An EngineSource of one source for each model. `check` runs before anything is loaded."""

    def __init__(self, sources: Mapping[str, EngineSource], check: Callable[[], None]) -> None:
        self._sources = dict(sources)
        self._check = check
        self._engines: ModelEngines | None = None

    def load(self, wake: Callable[[], None]) -> Engine:
        """Raises SettingsError as `check`, and what a source raises."""
        self._check()
        self._engines = ModelEngines({name: source.load(wake) for name, source in self._sources.items()})
        return self._engines

    def replacement(self) -> Engine | None:
        found = {name: source.replacement() for name, source in self._sources.items()}
        better = {name: engine for name, engine in found.items() if engine is not None}
        if self._engines is None or not better:
            return None
        self._engines = self._engines.with_replaced(better)
        return self._engines

    def building(self) -> Building | None:
        """Returns the progress of the first model that is built."""
        return next(filter(None, (source.building() for source in self._sources.values())), None)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def _engines(settings: Settings, names: list[str]) -> dict[str, str | None]:
    """Returns name -> value of --engine, None where it says nothing."""
    if len(names) == 1 and (settings.engine is None or not settings.engine.startswith(f"{names[0]}=")):
        return {names[0]: settings.engine}
    chosen: dict[str, str | None] = dict.fromkeys(names)
    given = [] if settings.engine is None else [part.strip() for part in settings.engine.split(",")]
    for part in given:
        if part in FOR_ALL and len(given) == 1:
            return dict.fromkeys(names, part)
        name, equals, value = part.rpartition("=")
        owner = _owner("--engine", part, name if equals and value else "", names, f"MODEL={part}")
        if chosen[owner] is not None:
            raise SettingsError(f"--engine: got {chosen[owner]!r} and {value!r} for {owner}, allowed: one")
        if value == "auto" and settings.backend not in BUILT_BACKENDS:
            raise SettingsError(f"--engine: got {part!r} with --backend {settings.backend}, which runs no built engine")
        chosen[owner] = value
    return chosen


def _owner(flag: str, text: str, name: str, names: list[str], qualified: str) -> str:
    """Returns the model that an option belongs to: `name`, or the only one."""
    allowed = f"MODEL is one of {', '.join(names)}"
    if name and name not in names:
        raise SettingsError(f"{flag}: got {text!r} for {name!r}, which no --model gives; {allowed}")
    if not name and len(names) > 1:
        raise SettingsError(f"{flag}: got {text!r} for no model; give {qualified}, where {allowed}")
    return name or names[0]


def _text(model: ModelOption) -> str:
    return model.source if model.name == model.source else f"{model.name}={model.source}"
