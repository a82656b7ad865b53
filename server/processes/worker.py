"""One of several server processes behind one port. The supervisor starts it.

    python -m server.processes.worker FD INDEX FOLDER [flags of python -m server]

FD is the worker's end of the channel, through which the supervisor sends accepted connections. FOLDER holds the
sockets of the workers' metrics. The end of the supervisor has the effect of SIGTERM.
"""

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.errors import EXIT_SETTINGS, SettingsError
from server.http.state import AppState
from server.live.sessions import LiveSessions
from server.loading.engine_loader import engine_source
from server.processes.accepting import free_descriptors, leaves_spare, open_files_limit
from server.processes.channel import MAX_ROOM, State, WorkerStatus, receive, send_status
from server.processes.cores import configure_openmp
from server.processes.garbage import pause_collector
from server.processes.malloc import configure_malloc
from server.processes.uvicorn_server import DrainingServer, uvicorn_config
from server.settings import load_settings
from server.telemetry import aggregation, logs
from server.telemetry.logs import RateLimitedLog

logger = logging.getLogger("server.processes")


class WorkerServer(DrainingServer):
    """A draining server whose connections come through a channel."""

    def __init__(
        self, config: uvicorn.Config, service: AppState, live: LiveSessions, end: socket.socket, metrics: Path
    ) -> None:
        super().__init__(config, service, live)
        self._end = end
        self._metrics = metrics
        self._received = 0
        self._status = WorkerStatus()
        self._exposing: asyncio.Server | None = None
        self._lost = RateLimitedLog(logger)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._exposing = await aggregation.serve_exposition(self._metrics, self._service.metrics.exposition)
        asyncio.get_running_loop().add_reader(self._end, self._read)

    async def on_tick(self, counter: int) -> bool:
        self._send_status("ready" if self._service.scheduler.state == "ready" else "unready")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._send_status("leaving")
        asyncio.get_running_loop().remove_reader(self._end)
        self._read()  # connections sent before the supervisor reads the status
        if self._exposing is not None:
            self._exposing.close()
        await super().shutdown(sockets)

    def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while (item := receive(self._end)) is not None:
            if item == "lost" or (isinstance(item, socket.socket) and not leaves_spare(item)):
                self._received += 1
                if isinstance(item, socket.socket):
                    item.close()
                self._lost.warning("a connection was lost: too many open files (limit: %d)", open_files_limit())
                continue
            if isinstance(item, socket.socket):
                self._received += 1
                self._on_connection(item)
                continue
            if item == "closed":
                loop.remove_reader(self._end)
            if self._service.scheduler.state != "draining":
                self._service.scheduler.begin_drain()
                self._begin_drain()
                self._send_status("unready")
            if item == "closed":
                return

    def _send_status(self, state: State) -> None:
        status = WorkerStatus(state, self._received, len(self.server_state.connections), free_descriptors(MAX_ROOM))
        if status != self._status and send_status(self._end, status):
            self._status = status


def serve(app: FastAPI, service: AppState, end: socket.socket, metrics: Path) -> None:
    """Serves connections from the channel until a signal, a drain message, or the end of the supervisor. Blocks."""
    WorkerServer(uvicorn_config(app, service.settings), service, app.state.live, end, metrics).run()


def main() -> int:
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(False)
    name, folder = sys.argv[2], Path(sys.argv[3])
    try:
        settings = load_settings(sys.argv[4:], os.environ)
        logs.configure(settings.log_format, settings.log_level, {"worker": name})
        configure_malloc(os.environ)
        pause_collector()
        app = create_app(
            engine_source(settings),
            settings,
            render_metrics=lambda _: aggregation.scrape_workers(folder),
            cores=configure_openmp(os.environ),
        )
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    serve(app, app.state.service, end, folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
