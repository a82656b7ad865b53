"""Makes engines from settings. No other server module imports engine code beyond its types."""

import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engines.fake import FakeEngine
from engines.types import Engine
from server.errors import SettingsError
from server.generation.engine_source import EngineSource, FixedEngineSource
from server.loading.automatic import AutomaticEngine, Candidate, Candidates
from server.settings import Settings

BUILDER = Path(__file__).resolve().parents[2] / "build_engine.py"  # beside the packages, installed or not


def engine_source(settings: Settings) -> EngineSource:
    """Returns the source of the engine that the settings ask for. Returns at once; its `load` is slow."""
    if settings.backend == "fake":
        names, delay_s = tuple(one.name for one in settings.lora if one.scale is None), settings.fake_delay_ms / 1000
        return FixedEngineSource(lambda: FakeEngine(max_batch=settings.max_batch, delay_s=delay_s, adapters=names))
    if settings.engine == "none" or (settings.engine is None and settings.backend != "auto"):
        return FixedEngineSource(lambda: load(settings))
    if settings.engine not in (None, "auto"):
        return FixedEngineSource(lambda: load(settings, settings.engine))
    try:
        operations = _Operations(settings)
    except RuntimeError as error:  # pathlib's, of a user without a home directory
        if settings.engine is None:
            return FixedEngineSource(lambda: load(settings))
        raise SettingsError("--engine: got 'auto', and this user has no home directory; give --cache") from error
    return AutomaticEngine(operations, while_building=settings.serve_while_building)


def load(
    settings: Settings,
    engine_dir: str | None = None,
    *,
    backend: str | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
    checkpoint: Any = None,
    import_s: float = 0.0,
) -> Engine:
    """Loads PyTorch's engine, or the built engines of a folder. Slow: reads a checkpoint.

    `backend` replaces the settings' backend. `checkpoint` is the settings' checkpoint if it is open already
    (engines.checkpoints.checkpoint), so that it is hashed once. `import_s` are seconds of imports before this call.
    """
    import_s += import_engines()
    from engines.loader import load_engine

    engine = load_engine(
        checkpoint or settings.model,
        engine_dir=engine_dir,
        backend=backend or settings.backend,
        max_batch=settings.max_batch,
        precision=None if settings.precision == "auto" else settings.precision,
        device=None if settings.device == "auto" else settings.device,
        decoder=None if checkpoint else settings.decoder,
        controlnet=settings.controlnet,
        variant=settings.variant,
        lora=settings.lora,
        cache=settings.cache or user_cache(os.environ),
        sizes=sizes,
    )
    engine.info.start_s["import"] = round(import_s, 3)
    return engine


def import_engines() -> float:
    """Imports torch and the code that finds and loads engines. Returns the seconds."""
    began = time.perf_counter()
    import engines.artifacts.candidates
    import engines.loader  # noqa: F401 - for its callers

    return time.perf_counter() - began


def user_cache(environment: Mapping[str, str]) -> str | None:
    """Returns this program's folder in XDG_CACHE_HOME, or None without that variable."""
    home = environment.get("XDG_CACHE_HOME")
    return str(Path(home) / "sana-sprint") if home else None


def engine_folder(cache: str | None, environment: Mapping[str, str]) -> Path:
    """Returns the folder of built engines: `engines` in the cache."""
    return Path(cache or user_cache(environment) or "~/.cache/sana-sprint").expanduser() / "engines"


class _Operations:
    """EngineOperations of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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
        result = candidates(
            settings.model,
            device=None if settings.device == "auto" else settings.device,
            backend=settings.backend,
            precision=None if settings.precision == "auto" else settings.precision,
            sizes=settings.engine_sizes,
            max_batch=settings.max_batch,
            decoder=settings.decoder,
            variant=settings.variant,
            lora=settings.lora,
        )
        self._sizes, self._checkpoint = result.sizes, result.checkpoint
        return Candidates(result.each, result.why_none)

    def find_built(self, candidate: Candidate, exclude: Collection[Path]) -> tuple[Path | None, list[str]]:
        from engines.artifacts.catalog import EngineRequirements, find_engine

        assert isinstance(candidate.requirements, EngineRequirements)
        return find_engine(self.folder, candidate.requirements, exclude)

    def open_built(self, path: Path) -> Engine:
        return load(self._settings, str(path), checkpoint=self._checkpoint, import_s=self._import_s)

    def load_pytorch(self, built_sizes_only: bool) -> Engine:
        built_only = self._settings.backend in ("openvino", "tensorrt")
        return load(
            self._settings,
            backend="auto" if built_only else None,
            sizes=self._sizes if built_sizes_only else (),
            import_s=self._import_s,
        )
