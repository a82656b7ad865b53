"""`python -m server` on one port, restarted whenever it ends, as an orchestrator does."""

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.harness.errors import BenchError
from bench.harness.http_client import ByteStream, Connection, HttpResponse
from bench.harness.prometheus_text import parse_samples
from bench.harness.server_process import ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S, free_port

POLL_S = 0.01


async def exchange_once(
    port: int, method: str, path: str, body: bytes = b"", media_type: str = "application/json"
) -> HttpResponse:
    """Exchanges on a fresh connection. Raises as Connection.exchange does."""
    connection = Connection(await ByteStream.connect("127.0.0.1", port), f"127.0.0.1:{port}")
    try:
        return await connection.exchange(method, path, body, media_type)
    finally:
        await connection.close()


async def ready_label(port: int) -> str:
    """Returns GET /health/ready as an outcome label of bench.robustness.scenario."""
    try:
        response = await exchange_once(port, "GET", "/health/ready")
    except ConnectionRefusedError:
        return "refused"
    except (OSError, EOFError):
        return "cut"
    return "200" if response.status == 200 else f"{response.status} {json.loads(response.body)['code']}"


class RestartingServer:
    """A supervised server. `exit_codes`: so far (negative: a signal). `log`: all output of the servers."""

    def __init__(self, flags: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.log = log
        self.exit_codes: list[int] = []
        self._command = [sys.executable, "-m", "server", "--port", str(self.port), *flags]
        self._environment = {**os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._stop_requested = False
        self._watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BenchError("the server was not started")
        return self._process.pid

    async def start(self) -> None:
        """Starts the server and waits until it is ready for the first time."""
        await self._spawn()
        self._watching = asyncio.create_task(self._watch(), name="supervisor")
        await self.wait_ready()

    async def stop(self) -> int:
        """Sends SIGTERM, stops restarting, and returns the exit code."""
        self._stop_requested = True
        self.send_signal(signal.SIGTERM)
        assert self._watching is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._watching), STOP_TIMEOUT_S)
        except TimeoutError as error:
            self.send_signal(signal.SIGKILL)
            await self._watching
            raise BenchError(f"the server did not leave within {STOP_TIMEOUT_S:g} s of SIGTERM") from error
        return self.exit_codes[-1]

    def send_signal(self, signal_number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal_number)

    def limit_files(self, max_bytes: int) -> None:
        """Keeps the server's files from growing beyond `max_bytes`, as a full disk does (EFBIG for ENOSPC)."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))

    def lift_limit(self) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    async def wait_ready(self) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if await ready_label(self.port) == "200":
                return
            await asyncio.sleep(POLL_S)
        raise BenchError(f"the server was not ready within {START_TIMEOUT_S:g} s; its log: {self.log}")

    async def wait_for_exit(self, exits: int) -> int:
        """Returns the exit code of the exit of that number, counted from 1."""
        end = time.monotonic() + STOP_TIMEOUT_S
        while len(self.exit_codes) < exits:
            if time.monotonic() > end:
                raise BenchError(f"the server did not end within {STOP_TIMEOUT_S:g} s; its log: {self.log}")
            await asyncio.sleep(POLL_S)
        return self.exit_codes[exits - 1]

    async def exchange(
        self, method: str, path: str, body: bytes = b"", media_type: str = "application/json"
    ) -> HttpResponse:
        return await exchange_once(self.port, method, path, body, media_type)

    async def metrics(self) -> dict[str, float]:
        """Returns the samples of /metrics."""
        return parse_samples((await self.exchange("GET", "/metrics")).body.decode())

    async def _spawn(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    async def _watch(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self.exit_codes.append(code)
            if self._stop_requested:
                return
            await self._spawn()
