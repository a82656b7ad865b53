"""python -m server: reads settings, builds the app and serves it.

Exit codes: 0 drained, 2 bad settings, 3 cannot start, 4 cannot listen, 70 a batch hung, 71 the engine is lost.
"""

import logging
import os
import sys

from server.errors import EXIT_LISTEN, EXIT_SETTINGS, ListenError, SettingsError
from server.loading.engine_loader import engine_source
from server.loading.model_sources import settings_by_model
from server.processes.accepting import raise_open_files_limit
from server.processes.cores import configure_openmp
from server.processes.garbage import pause_collector
from server.processes.malloc import configure_malloc
from server.processes.torch_library import load_torch_library
from server.settings import load_settings
from server.telemetry import logs


def main() -> int:
    try:
        settings = load_settings(sys.argv[1:], os.environ)
        logs.configure(settings.log_format, settings.log_level)
        raise_open_files_limit()
        settings_by_model(settings)  # raises for a bad combination before any process starts
        if settings.workers > 1:
            from server.processes.supervisor import supervise

            return supervise(settings, sys.argv[1:], os.environ)
        configure_malloc(os.environ)
        cores = configure_openmp(os.environ)
        pause_collector()
        if settings.backend != "fake":
            load_torch_library(os.environ)
        from server.app import create_app  # while torch's library loads
        from server.processes.uvicorn_server import serve

        serve(create_app(engine_source(settings), settings, cores=cores), settings)
    except ListenError as error:
        logging.getLogger("server").critical("%s", error)
        return EXIT_LISTEN
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    return 0


if __name__ == "__main__":
    sys.exit(main())
