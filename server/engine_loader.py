"""From settings to an engine: the only module of the server that reaches into the GPU world beyond its types."""

import os
from collections.abc import Mapping
from pathlib import Path

from engines.fake import FakeEngine
from engines.types import Engine
from server.settings import Settings


def load(settings: Settings) -> Engine:
    """The engine that the settings ask for. Slow: reads a checkpoint."""
    if settings.backend == "fake":
        names = tuple(one.name for one in settings.lora if one.scale is None)
        return FakeEngine(max_batch=settings.max_batch, delay_s=settings.fake_delay_ms / 1000, adapters=names)
    from engines.loader import load_engine  # brings torch

    return load_engine(
        settings.model,
        engine_dir=settings.engine,
        backend=settings.backend,
        max_batch=settings.max_batch,
        precision=None if settings.precision == "auto" else settings.precision,
        device=None if settings.device == "auto" else settings.device,
        decoder=settings.decoder,
        controlnet=settings.controlnet,
        variant=settings.variant,
        lora=settings.lora,
        cache=settings.cache or user_cache(os.environ),
    )


def user_cache(environment: Mapping[str, str]) -> str | None:
    """This program's folder where XDG_CACHE_HOME names the user's cache; None where it does not."""
    place = environment.get("XDG_CACHE_HOME")
    return str(Path(place) / "sana-sprint") if place else None
