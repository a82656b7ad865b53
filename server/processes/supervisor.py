"""Several processes behind one port, one for each GPU. Sends each connection to the worker with the fewest.

A worker (server/processes/worker.py) is a whole server with its own engine; workers share nothing that could fail. The
supervisor restarts a worker that ends, and sends it connections once it is ready. SIGTERM drains all workers. The
supervisor reads no HTTP and holds no connection, so it neither slows nor loses requests. docs/understand/decisions/0008
says why it uses neither SO_REUSEPORT nor a proxy.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import EXIT_SETTINGS, EXIT_START, SettingsError
from server.http.api_keys import ApiKeys
from server.processes import channel
from server.processes.accepting import Acceptor, check_descriptors, listen, too_many_files
from server.processes.announce import print_listening, print_ready, server_url
from server.processes.cores import THREADS, threads_per_worker
from server.settings import Settings
from server.telemetry.logs import RateLimitedLog

PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the next start in a slot whose last workers never became ready
KILL_S = 10.0  # after the shutdown timeout

logger = logging.getLogger("server.processes")


@dataclass(eq=False)
class Worker:
    """A worker process and its last status."""

    index: int
    process: asyncio.subprocess.Process
    end: socket.socket
    sent: int = 0  # connections
    status: channel.WorkerStatus | None = None  # None: it has not started to accept
    was_ready: bool = False

    @property
    def connections(self) -> int:
        """Its open connections, and those sent that it has not yet reported."""
        return self.sent + (self.status.open - self.status.received if self.status else 0)

    @property
    def has_room(self) -> bool:
        """True if it can hold another connection besides those sent that it has not yet reported."""
        return self.status is not None and self.status.room > self.sent - self.status.received

    @property
    def is_leaving(self) -> bool:
        return self.status is not None and self.status.state == "leaving"

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """The worker with the lowest rank gets the next connection."""
        ready = self.status is not None and self.status.state == "ready"
        return not self.has_room, not ready, self.connections, self.sent


class Supervisor:
    """`environments` holds one for each worker; all of them get `arguments`, those of python -m server."""

    def __init__(self, settings: Settings, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._settings = settings
        self._arguments = arguments
        self._environments = environments
        self._workers: list[Worker] = []
        self._acceptor: Acceptor | None = None
        self._draining = asyncio.Event()
        self._ready = asyncio.Event()
        self._refused = RateLimitedLog(logger)

    async def run(self) -> int:
        """Serves until a signal, or until a worker cannot start. Returns the worst exit code of the last workers.

        Raises ListenError.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        listeners = listen(self._settings.host, self._settings.port)
        self._acceptor = Acceptor(listeners, self._dispatch, self._check_capacity)  # `_on_status` starts it
        url = server_url(self._settings.host, listeners[0].getsockname()[1])
        print_listening(url, f"{self._settings.model} in {len(self._environments)} processes")
        announcing = loop.create_task(self._announce(url))
        folder = Path(tempfile.mkdtemp(prefix="sprint-"))
        slots = [loop.create_task(self._run_slot(index, folder)) for index in range(len(self._environments))]
        codes = await self._until_drained(slots)
        for index in range(len(slots)):  # needs no descriptor; there may be none left
            (folder / str(index)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        announcing.cancel()
        self._acceptor.close()
        worst = max(codes, key=abs)
        return worst if worst >= 0 else 128 - worst

    async def _until_drained(self, slots: Sequence[asyncio.Task[int]]) -> Sequence[int]:
        await self._draining.wait()
        settings = self._settings
        logger.info("draining %d workers: at most %g s", len(self._workers), settings.shutdown_timeout_s)
        for worker in self._workers:
            channel.send_drain(worker.end)
        await asyncio.wait(slots, timeout=settings.drain_delay_s + settings.shutdown_timeout_s + KILL_S)
        for worker in self._workers:
            logger.error("worker %d did not end; killing it", worker.index)
            worker.process.kill()
        return await asyncio.gather(*slots)

    def _on_signal(self) -> None:
        if self._draining.is_set():
            for worker in self._workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.terminate()
        self._draining.set()

    async def _run_slot(self, index: int, folder: Path) -> int:
        """Runs one worker slot: restarts the worker until drain. Returns the last exit code."""
        failed = 0
        while True:
            try:
                worker = await self._start(index, folder)
            except OSError as error:  # no descriptor, memory or process left for now
                failed += 1
                logger.error("worker %d cannot be started (%s); another attempt in %g s", index, error, _pause(failed))
                if await self._drained_within(_pause(failed)):
                    return 0
                continue
            code = await worker.process.wait()
            self._on_exit(worker)
            if self._draining.is_set():
                return code
            if code == EXIT_SETTINGS or (code == EXIT_START and not self._ready.is_set()):
                self._draining.set()  # another start would fail too
                return code
            failed = 0 if worker.was_ready else failed + 1
            logger.error("worker %d ended with code %d; another one starts in %g s", index, code, _pause(failed))
            if await self._drained_within(_pause(failed)):
                return code

    async def _drained_within(self, seconds: float) -> bool:
        """Waits; returns whether the drain has begun."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._draining.wait(), seconds)
        return self._draining.is_set()

    async def _start(self, index: int, folder: Path) -> Worker:
        ours, theirs = channel.channel()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "server.processes.worker", str(theirs.fileno()), str(index), str(folder)),
                    *self._arguments,
                    env=self._environments[index],
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C reaches this process only, which then drains the workers
                )
        except OSError:
            ours.close()
            raise
        worker = Worker(index, process, ours)
        asyncio.get_running_loop().add_reader(ours, self._on_status, worker)
        self._workers.append(worker)
        if self._draining.is_set():
            channel.send_drain(ours)
        return worker

    def _on_exit(self, worker: Worker) -> None:
        asyncio.get_running_loop().remove_reader(worker.end)
        worker.end.close()
        self._workers.remove(worker)
        if self._acceptor is not None and not any(other.status for other in self._workers):
            self._acceptor.pause()  # until one has started to accept

    def _on_status(self, worker: Worker) -> None:
        status, is_open = channel.receive_status(worker.end)
        if status is not None:
            worker.status = status
            if self._acceptor is not None:
                self._acceptor.resume()
            if status.state == "ready" and not worker.was_ready:
                worker.was_ready = True
                self._ready.set()
                logger.info("worker %d is ready (pid %d)", worker.index, worker.process.pid)
        if not is_open:
            asyncio.get_running_loop().remove_reader(worker.end)

    def _check_capacity(self) -> None:
        """Raises OSError if this process or all workers cannot hold another connection."""
        check_descriptors()
        willing = [worker for worker in self._workers if not worker.is_leaving]
        if willing and not any(worker.has_room for worker in willing):
            begun = any(worker.status for worker in willing)
            raise too_many_files() if begun else OSError(errno.EAGAIN, "no worker has begun")

    def _dispatch(self, connection: socket.socket) -> None:
        willing = [worker for worker in self._workers if not worker.is_leaving]
        for worker in sorted(willing, key=lambda worker: worker.rank):
            if channel.send_connection(worker.end, connection):
                worker.sent += 1
                return
        self._refused.warning("no worker takes the connection")
        connection.close()

    async def _announce(self, url: str) -> None:
        await self._ready.wait()
        print_ready(url)


def supervise(settings: Settings, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Serves with `settings.workers` processes until a signal. Blocks, and returns the exit code.

    Raises SettingsError, ListenError.
    """
    if settings.api_key_file is not None:
        ApiKeys(Path(settings.api_key_file))  # raises for a bad file before anything starts
    return asyncio.run(_run(settings, arguments, environments(settings, environment)))


async def _run(settings: Settings, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    try:
        return await Supervisor(settings, arguments, environments).run()
    except OSError as error:  # the folder for the workers' metrics
        logger.critical("cannot start: %s", error)
        return EXIT_START


def _pause(failed: int) -> float:
    return PAUSES_S[min(failed, len(PAUSES_S) - 1)]


def environments(
    settings: Settings, environment: Mapping[str, str], devices: Path = Path("/dev")
) -> list[dict[str, str]]:
    """Returns the environment of each worker: its own GPU or, without one, its share of the cores.

    The GPUs are those of CUDA_VISIBLE_DEVICES or, if it is not set, those with a node in `devices`.
    Raises SettingsError for more workers than GPUs.
    """
    count = settings.workers
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number in range(len(list(devices.glob("nvidia[0-9]*"))))]
    else:
        gpus = [name.strip() for name in visible.split(",") if name.strip()]
    if not gpus or settings.device == "cpu" or settings.backend == "fake":
        return [{**environment, THREADS: threads_per_worker(environment, count)} for _ in range(count)]
    if count > len(gpus):
        raise SettingsError(
            f"--workers: got {count}, allowed: at most {len(gpus)}, one for each GPU ({', '.join(gpus)})"
        )
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environment}
    return [{**order, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]
