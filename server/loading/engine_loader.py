"""From settings to an engine: the only module of the server that reaches into the GPU world beyond its types."""

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engines.fake import FakeEngine
from engines.types import Engine
from server.errors import SettingsError
from server.generation.engine_source import EngineSource, FixedEngineSource
from server.loading.automatic import AutomaticEngine, Candidate, Offers, Ways
from server.settings import Settings

BUILDER = Path(__file__).resolve().parents[2] / "build_engine.py"  # beside the packages, installed or not


def engine_source(settings: Settings) -> EngineSource:
    """Where the engine that the settings ask for comes from. Returns at once; `load` of it is slow."""
    if settings.backend == "fake":
        names, delay_s = tuple(one.name for one in settings.lora if one.scale is None), settings.fake_delay_ms / 1000
        return FixedEngineSource(lambda: FakeEngine(max_batch=settings.max_batch, delay_s=delay_s, adapters=names))
    if settings.engine == "none" or (settings.engine is None and settings.backend != "auto"):
        return FixedEngineSource(lambda: load(settings))
    if settings.engine not in (None, "auto"):
        return FixedEngineSource(lambda: load(settings, settings.engine))
    try:
        ways = _Ways(settings)
    except RuntimeError as error:  # pathlib's, of a user without a home directory
        if settings.engine is None:
            return FixedEngineSource(lambda: load(settings))
        raise SettingsError("--engine: got 'auto', and this user has no home directory; give --cache") from error
    return AutomaticEngine(
        ways.folder,
        Ways(ways.look, ways.find, ways.built, ways.plain, (sys.executable, str(BUILDER))),
        while_building=settings.serve_while_building,
    )


def load(
    settings: Settings,
    engine_dir: str | None = None,
    *,
    backend: str | None = None,
    sizes: tuple[tuple[int, int], ...] = (),
    checkpoint: Any = None,
) -> Engine:
    """PyTorch's engine, or the built ones of a folder. Slow: reads a checkpoint. backend: in place of the settings'.

    checkpoint: that of the settings (engines.checkpoints.checkpoint), open already; its digest is not taken twice.
    """
    from engines.loader import load_engine  # brings torch

    return load_engine(
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


def user_cache(environment: Mapping[str, str]) -> str | None:
    """This program's folder where XDG_CACHE_HOME names the user's cache; None where it does not."""
    place = environment.get("XDG_CACHE_HOME")
    return str(Path(place) / "sana-sprint") if place else None


def engine_folder(cache: str | None, environment: Mapping[str, str]) -> Path:
    """Where engines are looked for and built: `engines` in the cache."""
    return Path(cache or user_cache(environment) or "~/.cache/sana-sprint").expanduser() / "engines"


class _Ways:
    """How the settings' engines are looked for, opened and replaced."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sizes: tuple[tuple[int, int], ...] = ()
        self._checkpoint: Any = None  # engines.checkpoints.checkpoint.Checkpoint, which brings torch
        self.folder = engine_folder(settings.cache, os.environ)

    def look(self) -> Offers:
        from engines.artifacts.candidates import candidates, has_gpu

        settings = self._settings
        if settings.engine is None and (settings.device == "cpu" or not has_gpu()):
            return Offers((), "")
        found = candidates(
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
        self._sizes, self._checkpoint = found.sizes, found.checkpoint
        return Offers(found.each, found.why_none)

    def find(self, candidate: Candidate, without: Collection[Path]) -> tuple[Path | None, list[str]]:
        from engines.artifacts.catalog import Wanted, find

        assert isinstance(candidate.wanted, Wanted)
        return find(self.folder, candidate.wanted, without)

    def built(self, path: Path) -> Engine:
        return load(self._settings, str(path), checkpoint=self._checkpoint)

    def plain(self, narrow: bool) -> Engine:
        built_only = self._settings.backend in ("openvino", "tensorrt")
        return load(self._settings, backend="auto" if built_only else None, sizes=self._sizes if narrow else ())
