"""One of several processes behind one port: the whole server, but for the port. Started by the supervisor.

    python -m server.processes.worker FD INDEX FOLDER [flags of python -m server]

FD is its end of a channel to the supervisor, FOLDER where the workers find one another's metrics. Connections arrive
through the channel, accepted already. A supervisor that is gone means the same as SIGTERM.
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
from server.live.sessions import Live
from server.loading.engine_loader import source
from server.processes.accepting import leaves_room, open_files_limit, room
from server.processes.channel import ROOM_TOLD, State, WorkerStatus, receive, send_report
from server.processes.cores import settle
from server.processes.malloc import keep_memory
from server.processes.uvicorn_server import DrainingServer, configuration
from server.settings import load_settings
from server.telemetry import aggregation, logs
from server.telemetry.logs import RateLimitedLog

logger = logging.getLogger("server.processes")


class WorkerServer(DrainingServer):
    """A draining server that is handed its connections."""

    def __init__(
        self, config: uvicorn.Config, service: AppState, live: Live, end: socket.socket, metrics: Path
    ) -> None:
        super().__init__(config, service, live)
        self._end = end
        self._metrics = metrics
        self._received = 0
        self._report = WorkerStatus()
        self._exposing: asyncio.Server | None = None
        self._lost = RateLimitedLog(logger)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._exposing = await aggregation.serve_exposition(self._metrics, self._service.metrics.exposition)
        asyncio.get_running_loop().add_reader(self._end, self._read)

    async def on_tick(self, counter: int) -> bool:
        self._tell("ready" if self._service.scheduler.state == "ready" else "unready")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._tell("leaving")
        asyncio.get_running_loop().remove_reader(self._end)
        self._read()  # what came before the supervisor heard
        if self._exposing is not None:
            self._exposing.close()
        await super().shutdown(sockets)

    def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while (item := receive(self._end)) is not None:
            if item == "lost" or (isinstance(item, socket.socket) and not leaves_room(item)):
                self._received += 1
                if isinstance(item, socket.socket):
                    item.close()
                self._lost.warning("a connection was lost: too many open files (limit: %d)", open_files_limit())
                continue
            if isinstance(item, socket.socket):
                self._received += 1
                self._take(item)
                continue
            if item == "closed":
                loop.remove_reader(self._end)
            if self._service.scheduler.state != "draining":
                self._service.scheduler.begin_drain()
                self._begin_drain()
                self._tell("unready")
            if item == "closed":
                return

    def _tell(self, state: State) -> None:
        report = WorkerStatus(state, self._received, len(self.server_state.connections), room(ROOM_TOLD))
        if report != self._report and send_report(self._end, report):
            self._report = report


def serve(app: FastAPI, service: AppState, end: socket.socket, metrics: Path) -> None:
    """Takes connections from the channel until a signal, the word to drain, or the supervisor's end. Blocks."""
    WorkerServer(configuration(app, service.settings), service, app.state.live, end, metrics).run()


def main() -> int:
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(False)
    name, folder = sys.argv[2], Path(sys.argv[3])
    try:
        settings = load_settings(sys.argv[4:], os.environ)
        logs.configure(settings.log_format, settings.log_level, {"worker": name})
        keep_memory(os.environ)
        app = create_app(
            source(settings),
            settings,
            render_metrics=lambda _: aggregation.scrape_workers(folder),
            cores=settle(os.environ),
        )
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    serve(app, app.state.service, end, folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
