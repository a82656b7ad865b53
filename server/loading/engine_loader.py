"""Makes engines from settings. No other server module imports engine code beyond its types."""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.fake import FakeEngine
from engines.types import Engine
from server.errors import SettingsError
from server.generation.engine_source import EngineSource, FixedEngineSource
from server.loading.automatic import AutomaticEngine, Candidate, Candidates
from server.loading.model_sources import ModelSources, settings_by_model
from server.settings import Settings

BUILDER = Path(__file__).resolve().parents[2] / "build_engine.py"  # beside the packages, installed or not

logger = logging.getLogger("server.loading")


@dataclass(frozen=True)
class Shared:
    """Parts of one of several models that are made once; each call returns the same object, of engines/."""

    name: str
    checkpoint: Callable[[], Any]  # engines.checkpoints.checkpoint.Checkpoint
    texts: Callable[[], Any]  # engines.pipeline.text_stage.TextStages, or None


def engine_source(settings: Settings) -> EngineSource:
    """Returns the source of the engine, or of one for each model, that the settings ask for.

    Returns at once; its `load` is slow. Raises SettingsError.
    """
    each = settings_by_model(settings)
    if len(each) == 1:
        return _source(next(iter(each.values())))
    # An engine that is warmed up beside the serving one may not share its text stage.
    texts = functools.cache(lambda: None if settings.serve_while_building else _text_stages())
    shared = {name: Shared(name, functools.cache(functools.partial(_open, one)), texts) for name, one in each.items()}
    sources = {name: _source(one, shared[name]) for name, one in each.items()}
    return ModelSources(sources, lambda: _check_memory(settings, each, shared))


def _source(settings: Settings, shared: Shared | None = None) -> EngineSource:
    if settings.backend == "fake":
        names, delay_s = tuple(one.name for one in settings.lora if one.scale is None), settings.fake_delay_ms / 1000
        most, fast = settings.max_batch, settings.fast_decoder
        name = "fake" if shared is None else shared.name
        return FixedEngineSource(
            lambda: FakeEngine(checkpoint=name, max_batch=most, delay_s=delay_s, adapters=names, fast_decoder=fast)
        )
    if settings.engine == "none" or (settings.engine is None and settings.backend != "auto"):
        return FixedEngineSource(lambda: load(settings, shared=shared))
    if settings.engine not in (None, "auto"):
        return FixedEngineSource(lambda: load(settings, settings.engine, shared=shared))
    try:
        operations = _Operations(settings, shared)
    except RuntimeError as error:  # pathlib's, of a user without a home directory
        if settings.engine is None:
            return FixedEngineSource(lambda: load(settings, shared=shared))
        raise SettingsError("--engine: got 'auto', and this user has no home directory; give --cache") from error
    return AutomaticEngine(operations, while_building=settings.serve_while_building)


def load(
    settings: Settings,
    engine_dir: str | None = None,
    *,
    backend: str | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
    checkpoint: Any = None,
    shared: Shared | None = None,
    import_s: float = 0.0,
) -> Engine:
    """Loads PyTorch's engine, or the built engines of a folder. Slow: reads a checkpoint.

    `backend` replaces the settings' backend. `checkpoint` is the settings' checkpoint if it is open already
    (engines.checkpoints.checkpoint), so that it is hashed once. `shared`: with several models. `import_s`: seconds of
    imports before this call.
    """
    import_s += import_engines()
    from engines.loader import load_engine

    (model,) = settings.models
    if checkpoint is None and shared is not None:
        checkpoint = shared.checkpoint()
    elif checkpoint is None and model.name != model.source:
        checkpoint = _open(settings)
    engine = load_engine(
        checkpoint or model.source,
        engine_dir=engine_dir,
        backend=backend or settings.backend,
        max_batch=settings.max_batch,
        precision=None if settings.precision == "auto" else settings.precision,
        device=None if settings.device == "auto" else settings.device,
        decoder=None if checkpoint else settings.decoder,
        fast_decoder=settings.fast_decoder,
        controlnet=settings.controlnet,
        variant=settings.variant,
        lora=settings.lora,
        cache=settings.cache or user_cache(os.environ),
        sizes=sizes,
        texts=None if shared is None else shared.texts(),
        threads_sleep=_threads_sleep(os.environ),
    )
    engine.info.start_s["import"] = round(import_s, 3)
    return engine


def _threads_sleep(environment: Mapping[str, str]) -> bool:
    """Returns whether OpenMP's threads wait without spinning, as server.processes.cores asks unless the user did."""
    return environment.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" and not environment.get("GOMP_SPINCOUNT")


def import_engines() -> float:
    """Imports torch and the code that finds and loads engines. Returns the seconds."""
    began = time.perf_counter()
    import engines.artifacts.candidates
    import engines.loader  # noqa: F401 - for its callers

    return time.perf_counter() - began


def _open(settings: Settings) -> Any:
    """Returns the checkpoint of a model under its name in requests."""
    from engines.checkpoints.checkpoint import open_checkpoint

    (model,) = settings.models
    return replace(open_checkpoint(model.source, settings.decoder, settings.variant), name=model.name)


def _text_stages() -> Any:
    from engines.pipeline.text_stage import TextStages

    return TextStages()


def _check_memory(settings: Settings, each: Mapping[str, Settings], shared: Mapping[str, Shared]) -> None:
    """Logs the memory that the models need. Raises SettingsError if they cannot fit."""
    if settings.backend == "fake":
        return
    from engines.artifacts.memory import PlannedEngine, planned_memory

    plan = planned_memory(
        [
            PlannedEngine(
                shared[name].checkpoint(),
                one.engine if one.engine not in (None, "auto", "none") else None,
                one.fast_decoder,
                one.controlnet,
                one.variant,
                one.lora,
            )
            for name, one in each.items()
        ],
        device=None if settings.device == "auto" else settings.device,
        precision=None if settings.precision == "auto" else settings.precision,
    )
    for line in plan.lines:
        logger.info("memory: %s", line)
    if not plan.fits:
        raise SettingsError(f"--model: {plan.summary}; give fewer or smaller models, or a larger device")


def user_cache(environment: Mapping[str, str]) -> str | None:
    """Returns this program's folder in XDG_CACHE_HOME, or None without that variable."""
    home = environment.get("XDG_CACHE_HOME")
    return str(Path(home) / "sana-sprint") if home else None


def engine_folder(cache: str | None, environment: Mapping[str, str]) -> Path:
    """Returns the folder of built engines: `engines` in the cache."""
    return Path(cache or user_cache(environment) or "~/.cache/sana-sprint").expanduser() / "engines"


class _Operations:
    """EngineOperations of the settings."""

    def __init__(self, settings: Settings, shared: Shared | None = None) -> None:
        self._settings = settings
        self._shared = shared
        self._sizes: tuple[tuple[int, int], ...] = ()
        self._import_s = 0.0
        self._checkpoint: Any = None  # engines.checkpoints.checkpoint.Checkpoint, which imports torch
        self.folder = engine_folder(settings.cache, os.environ)
        self.build_command = (sys.executable, str(BUILDER))

    def find_candidates(self) -> Candidates:
        self._import_s = import_engines()
        from engines.artifacts.candidates import candidates, has_gpu

        settings = self._settings
        if settings.engine is None and (settings.device == "cpu" or not has_gpu()):
            return Candidates((), "")
        (model,) = settings.models
        result = candidates(
            model.source,
            device=None if settings.device == "auto" else settings.device,
            backend=settings.backend,
            precision=None if settings.precision == "auto" else settings.precision,
            sizes=settings.engine_sizes,
            max_batch=settings.max_batch,
            decoder=settings.decoder,
            variant=settings.variant,
            fast_decoder=settings.fast_decoder,
            lora=settings.lora,
        )
        self._sizes, self._checkpoint = result.sizes, replace(result.checkpoint, name=model.name)
        return Candidates(result.each, result.why_none)

    def find_built(self, candidate: Candidate, exclude: Collection[Path]) -> tuple[Path | None, list[str]]:
        from engines.artifacts.catalog import EngineRequirements, find_engine

        assert isinstance(candidate.requirements, EngineRequirements)
        return find_engine(self.folder, candidate.requirements, exclude)

    def open_built(self, path: Path) -> Engine:
        return load(
            self._settings, str(path), checkpoint=self._checkpoint, shared=self._shared, import_s=self._import_s
        )

    def load_pytorch(self, built_sizes_only: bool) -> Engine:
        built_only = self._settings.backend in ("openvino", "tensorrt")
        backend, sizes = "auto" if built_only else None, self._sizes if built_sizes_only else ()
        return load(self._settings, backend=backend, sizes=sizes, shared=self._shared, import_s=self._import_s)
