"""python -m server: settings, engine, app, listener.

Exit codes: 0 after a drain, 2 bad settings, 3 cannot start, 70 a batch hung, 71 the engine is lost.
"""

import os
import sys

from engines.fake import FakeEngine
from engines.types import Engine
from server import logs
from server.app import create_app
from server.errors import EXIT_SETTINGS, SettingsError
from server.listener import serve
from server.settings import Settings, read


def load(settings: Settings) -> Engine:
    """The engine that the settings ask for. Slow: reads a checkpoint."""
    if settings.backend == "fake":
        return FakeEngine(max_batch=settings.max_batch, delay_s=settings.fake_delay_ms / 1000)
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
    )


def main() -> int:
    try:
        settings = read(sys.argv[1:], os.environ)
        logs.configure(settings.log_format, settings.log_level)
        app = create_app(lambda: load(settings), settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    serve(app, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
