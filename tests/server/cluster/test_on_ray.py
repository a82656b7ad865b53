"""python -m server.cluster with real Ray: 2,000 requests while replicas start, one is killed, and replicas end."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from program import Program

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
pytestmark = pytest.mark.slow

REQUESTS = 2000
CLIENTS = 32
IMAGES = 100  # distinct requests
LIMIT_S = 1800
# Starts and reports are slow on busy cores; Serve would give up with its defaults.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SETTINGS = ("--backend", "fake", "--fake-delay-ms", "100", "--max-batch", "2", "--log-level", "warning")
SCALE = (
    "--min-replicas",
    "2",
    "--max-replicas",
    "3",
    "--cpus",
    "0.1",
    "--target-waiting-jobs",
    "4",
    "--upscale-delay-s",
    "3",
)


def body(number: int) -> dict[str, object]:
    return {"prompt": f"a circle, number {number % IMAGES}", "seed": number % IMAGES, "width": 64, "height": 64}


class Client:
    """A client with one connection and no retries."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def ask(self, method: str, path: str, data: dict[str, object] | None = None) -> tuple[int, bytes]:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT_S)
            self._connections.append(self._local.connection)
        payload = None if data is None else json.dumps(data)
        self._local.connection.request(method, path, payload, {"content-type": "application/json"})
        answer = self._local.connection.getresponse()
        return answer.status, answer.read()

    def image(self, number: int) -> tuple[int, int, bytes]:
        return (number, *self.ask("POST", "/generate", body(number)))

    def replicas(self) -> set[str]:
        status, text = self.ask("GET", "/metrics")
        return set(re.findall(rb'sana_sprint_engine_info\{replica="(\w+)"', text)) if status == 200 else set()


class Started(Program):
    exit_timeout_s = LIMIT_S

    def __init__(self, *arguments: str) -> None:
        super().__init__("-m", *arguments, **PATIENCE)

    def client(self) -> Client:
        until("ready", lambda: "\nready" in self.output or self.process.poll() is not None)
        found = re.search(r"ready \(docs at http://127\.0\.0\.1:(\d+)", self.output)
        assert found, self.output[-4000:]
        return Client(int(found[1]))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait_end()


def until(what: str, condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.2)


def replica_processes(ancestor: int) -> list[int]:
    """Returns the process ids of the replicas of the cluster that `ancestor` started."""

    def parents(pid: int) -> Iterator[int]:
        while pid > 1:
            yield pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:"):
                found += [int(folder.name)] if ancestor in parents(int(folder.name)) else []
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Watch:
    """Records which replicas /metrics lists, and since when."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.began = time.monotonic()
        self.seen: list[tuple[float, set[str]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    @property
    def count(self) -> int:
        return len(self.seen[-1][1]) if self.seen else 0

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(0.5):
            names = self._client.replicas()
            if names and (not self.seen or self.seen[-1][1] != names):
                self.seen.append((time.monotonic() - self.began, names))


def test_no_request_is_lost_while_replicas_come_die_and_go() -> None:
    single = Started("server", *SETTINGS, "--fake-delay-ms", "0", "--port", "0")
    client = single.client()
    reference = [client.image(number)[2] for number in range(IMAGES)]
    client.close()
    assert single.stop() == 0

    cluster = Started("server.cluster", *SETTINGS, *SCALE, "--downscale-delay-s", "15", "--port", str(free_port()))
    client = cluster.client()
    watch = Watch(client)
    until("two replicas", lambda: watch.count == 2)
    numbers, answers, wrong = count(), Counter[int](), 0
    killed: list[int] = []  # after so many answers

    def enough() -> bool:
        return answers.total() >= REQUESTS and bool(killed) and answers.total() >= killed[0] + REQUESTS // 4

    def work() -> None:
        nonlocal wrong
        while not enough():
            number, status, image = client.image(next(numbers))
            with lock:
                answers[status] += 1
                wrong += image != reference[number % IMAGES]

    lock = threading.Lock()
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        workers = [pool.submit(work) for _ in range(CLIENTS)]
        until("three replicas", lambda: watch.count == 3)
        until("some answers", lambda: answers.total() >= REQUESTS // 4)
        os.kill(replica_processes(cluster.process.pid)[0], signal.SIGKILL)
        killed.append(answers.total())
        for worker in workers:
            worker.result()
    seconds = time.monotonic() - began
    until("two replicas", lambda: watch.count == 2)
    watch.end()
    client.close()
    code = cluster.stop()
    retried = cluster.output.count("asking again")
    print(f"\n{answers.total()} requests in {seconds:.0f} s, {CLIENTS} at a time: {dict(answers)}, {wrong} wrong")
    print(f"one replica killed after {killed[0]} answers; {retried} asked again; exit code {code}")
    print("replicas:", ", ".join(f"{len(names)} at {at:.0f} s" for at, names in watch.seen))
    assert set(answers) == {200}
    assert wrong == 0
    assert retried > 0
    assert code == 0
