"""python -m server: settings, engine, app, and a listener that drains on SIGTERM.

Exit codes: 0 after a drain, 2 bad settings, 3 cannot start, 70 a batch hung, 71 the engine is lost.
"""

import asyncio
import logging
import math
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engines.fake import FakeEngine
from engines.types import Engine
from server import logs
from server.app import create_app
from server.errors import EXIT_SETTINGS, SettingsError
from server.service import Service
from server.settings import Settings, read

KEEP_ALIVE_S = 75  # longer than the 60 s that balancers keep idle connections: they close first, nobody races

logger = logging.getLogger("server")


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
    )


class DrainingServer(uvicorn.Server):
    """A uvicorn server whose first SIGTERM or SIGINT drains.

    It goes on listening, answers 503 to what is new, and stops once everything accepted is answered. A second signal
    stops it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        self._tasks.append(asyncio.create_task(self._announce(port), name="announce"))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        batcher = self._service.batcher
        if batcher.loop is None or batcher.state == "draining":
            super().handle_exit(sig, frame)
        else:
            batcher.begin_drain()
            batcher.loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain(), name="drain"))

    async def _drain(self) -> None:
        settings = self._service.settings
        logger.info("draining: at most %g s", settings.drain_limit_s)
        await asyncio.sleep(settings.drain_delay_s)
        batcher = self._service.batcher
        await batcher.drain()
        # What is left is to send answers to slow readers.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(batcher.drain_left_s))
        self.should_exit = True

    async def _announce(self, port: int) -> None:
        """Says where the server listens at once, and once it is ready, with a line to paste."""
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"listening on {address}; loading {self._service.settings.model}", flush=True)
        await self._service.batcher.ready.wait()
        body = '{"prompt": "a red circle on a white background", "seed": 7}'
        print(f"ready (docs at {address}/docs). Try:")
        print(f"curl -s {address}/generate -H 'content-type: application/json' -d '{body}' -o picture.png", flush=True)


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


def serve(app: FastAPI, settings: Settings) -> None:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, math.ceil(settings.drain_limit_s)),
    )
    DrainingServer(config, app.state.service).run()


if __name__ == "__main__":
    sys.exit(main())
